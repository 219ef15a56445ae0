// Words -> standard normals (Box & Muller 1958), by the standard of docs/noise.md: these very operations in this order.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

// sqrt(-2 ln u) of u = (w + 1/2) 2^-32. From u or 1 - u, whichever is smaller, so that no u rounds to 1.
template <class F>
DIFFKERN_FN F radius(typename Lanes<F>::U w) {
  using I = typename Lanes<F>::I;
  // -2 (ln(1+f) - f) / f^2 on [-1/3, 1/3]
  constexpr float kLog[] = {0x1.ffffd6p-1f, -0x1.5554fcp-1f, 0x1.00144ep-1f, -0x1.99d3b0p-2f,
                            0x1.5038e0p-2f, -0x1.1ea898p-2f, 0x1.3b0c5cp-2f, -0x1.1f2812p-2f};
  constexpr int32_t kTwoThirds = 0x3F2AAAAB;
  I s = I(w);
  F x = to_float(s ^ (s >> 31)) + 0.5f;  // 2^32 u, or 2^32 (1 - u) in the upper half
  F y = s < 0 ? 0x1p32f - x : x;
  I i = as_int(y) - (kTwoThirds + (32 << 23));
  I e = i >> 23;  // u = 2^e (1 + f)
  F f = as_float((i & 0x007FFFFF) + kTwoThirds) - 1.0f;
  f = e == 0 ? x * -0x1p-32f : f;
  return sqrt(((f * f) * polynomial(f, kLog) + f * -2.0f) + to_float(e) * -0x1.62e430p+0f);
}

template <class F>
struct CosSin {
  F cos, sin;
};

// cos and sin of w 2^-32 turns, reduced to [-1/8, 1/8] turn by integers.
template <class F>
DIFFKERN_FN CosSin<F> cos_sin(typename Lanes<F>::U w) {
  using I = typename Lanes<F>::I;
  using U = typename Lanes<F>::U;
  constexpr float kSin[] = {0x1.921fb6p+0f, -0x1.4abc24p-1f, 0x1.4680a4p-4f, -0x1.33198ep-8f};
  constexpr float kCos[] = {-0x1.3bd3a2p+0f, 0x1.03b18ep-2f, -0x1.4eb112p-6f};
  F t = to_float(I(w << 2)) * 0x1p-32f;  // quarter turns
  F t2 = t * t;
  F sin = t * polynomial(t2, kSin), cos = t2 * polynomial(t2, kCos) + 1.0f;
  U quarter = w + (1u << 29);  // in the top two bits
  I odd = (quarter & (1u << 30)) != 0u;
  F swapped_cos = odd ? sin : cos, swapped_sin = odd ? cos : sin;
  constexpr uint32_t kSign = 1u << 31;
  return {as_float(as_int(swapped_cos) ^ I((quarter + (1u << 30)) & kSign)),
          as_float(as_int(swapped_sin) ^ I(quarter & kSign))};
}

}  // namespace diffkern
