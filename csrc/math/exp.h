// e^x in float32 +, - and x, each rounded once in the written order: the same bits on every CPU level and device.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

// e^z - 1 - z on [-ln 2 / 2, ln 2 / 2]
template <class F>
DIFFKERN_FN F exp_curve(F z) {
  constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558aap-5f, 0x1.123978p-7f, 0x1.6a5384p-10f};
  return (z * z) * polynomial(z, kExp);
}

// Within 1.01 ulp on [-87.3, 88.3]; 0 below -87.7 (no subnormals), infinity above 88.4, NaN for NaN.
template <class F>
DIFFKERN_FN F exp(F x) {
  constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: a sum with it is a whole number, which its low bits hold
  x = x > 88.5f ? 88.5f : x;  // these round to n = 128 and -127, which make the scale infinity and 0
  x = x < -88.0f ? -88.0f : x;
  F t = x * kLog2e + kRound;
  F n = t - kRound;
  F z = (x - n * kLn2High) - n * kLn2Low;  // x = n ln 2 + z; the first product is exact (Cody & Waite 1980)
  F power = exp_curve(z) + z + 1.0f;
  return power * as_float((as_int(t) << 23) + 0x3F800000);
}

// e^x - 1 - x: how far the exponential is above its tangent at 0. Near 0, where the three cancel, relatively exact.
template <class F>
DIFFKERN_FN F exp_above_tangent(F x) {
  const F far = (exp(x) - 1.0f) - x;
  F curve = exp_curve(x);
  curve = x < -0.34f ? far : curve;
  return x > 0.34f ? far : curve;
}

}  // namespace diffkern
