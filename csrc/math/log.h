// ln x in float32 +, - and x, each rounded once in the written order.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

// ln x of a normal x > 0; infinity for infinity, NaN for NaN.
template <class F>
DIFFKERN_FN F log(F x) {
  // (ln(1+f) - f) / f^2 on [-1/3, 1/3]: radius's polynomial
  constexpr float kLog[] = {-0x1.ffffd6p-2f, 0x1.5554fcp-2f, -0x1.00144ep-2f, 0x1.99d3b0p-3f,
                            -0x1.5038e0p-3f, 0x1.1ea898p-3f, -0x1.3b0c5cp-3f, 0x1.1f2812p-3f};
  constexpr float kLn2 = 0x1.62e430p-1f;
  constexpr int32_t kTwoThirds = 0x3F2AAAAB;
  auto i = as_int(x) - kTwoThirds;
  auto e = i >> 23;  // x = 2^e (1 + f)
  F f = as_float((i & 0x007FFFFF) + kTwoThirds) - 1.0f;
  F y = ((f * f) * polynomial(f, kLog) + f) + to_float(e) * kLn2;
  return x < __builtin_inff() ? y : x;
}

}  // namespace diffkern
