// silu(x) = x / (1 + e^-x), for the network's kernels, where speed counts and the last bit does not. Noise and updates
// take math/exp.h instead, whose bits are the same everywhere.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

#ifdef __CUDACC__

DIFFKERN_FN float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DIFFKERN_FN float quotient(float a, float b) { return __fdividef(a, b); }
DIFFKERN_FN float exp_approx(float x) { return __expf(x); }

#else

DIFFKERN_FN f32v quotient(f32v a, f32v b) { return a / b; }

// Within 2e-7 (1 + |x|) of itself; 0 and infinity beyond about 87, NaN for NaN.
DIFFKERN_FN f32v exp_approx(f32v x) {
  constexpr float kLog2e = 0x1.715476p+0f;
  // 2^z on [-1/2, 1/2]
  constexpr float kExp2[] = {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
  const f32v y = x * kLog2e, z = from_nearest_whole(y);
  f32v power = broadcast(kExp2[5]);
#pragma GCC unroll 5
  for (int k = 4; k >= 0; --k) power = multiply_add(power, z, broadcast(kExp2[k]));
  return times_power_of_2(power, y - z);
}

// Within 2^-12 of itself: for results of bfloat16.
DIFFKERN_FN f32v silu_approx(f32v x) { return x * reciprocal_approx(1.0f + exp_approx(-x)); }

#endif

template <class F>
DIFFKERN_FN F silu(F x) {
  return quotient(x, 1.0f + exp_approx(-x));
}

template <class F>
DIFFKERN_FN F silu_slope(F x) {
  F sigmoid = quotient(F{} + 1.0f, 1.0f + exp_approx(-x));
  return sigmoid * multiply_add(x, 1.0f - sigmoid, F{} + 1.0f);
}

}  // namespace diffkern
