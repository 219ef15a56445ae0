// The types that the equations in math/ are written in: "lanes" of float, int32 and uint32.
//
// Each equation is a template over its float type F and is compiled for both backends:
//   F = f32v of simd.h       a register of floats           CPU kernels
//   F = Rounded              one float, never contracted    CUDA threads
// An F has + - * and the comparisons, `mask ? a : b`, and the functions sqrt, to_float, as_int, as_float, and max and
// min, which give their second argument where one is NaN.
// Every operation rounds once: contraction is off on the host, and Rounded asks for it on the device.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFKERN_FN static __device__ __forceinline__
#define DIFFKERN_LONG_FN static __device__ __noinline__  // too long for a copy in each unrolled iteration
#define DIFFKERN_UNROLL _Pragma("unroll")
#else
#define DIFFKERN_FN static inline __attribute__((always_inline))
#define DIFFKERN_LONG_FN DIFFKERN_FN
#define DIFFKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace diffkern {

template <class F>
struct Lanes;  // of one F: the integer types I and U of the same width

#ifdef __CUDACC__

struct Rounded {
  float value;
  Rounded() = default;
  __device__ __forceinline__ Rounded(float v) : value(v) {}
};

template <>
struct Lanes<Rounded> {
  using I = int32_t;
  using U = uint32_t;
};

DIFFKERN_FN Rounded operator+(Rounded a, Rounded b) { return __fadd_rn(a.value, b.value); }
DIFFKERN_FN Rounded operator-(Rounded a, Rounded b) { return __fsub_rn(a.value, b.value); }
DIFFKERN_FN Rounded operator*(Rounded a, Rounded b) { return __fmul_rn(a.value, b.value); }
DIFFKERN_FN Rounded operator/(Rounded a, Rounded b) { return __fdiv_rn(a.value, b.value); }
DIFFKERN_FN Rounded operator-(Rounded a) { return -a.value; }
DIFFKERN_FN bool operator<(Rounded a, Rounded b) { return a.value < b.value; }
DIFFKERN_FN bool operator>(Rounded a, Rounded b) { return a.value > b.value; }
DIFFKERN_FN Rounded sqrt(Rounded a) { return __fsqrt_rn(a.value); }
DIFFKERN_FN Rounded max(Rounded a, Rounded b) { return a.value > b.value ? a : b; }
DIFFKERN_FN Rounded min(Rounded a, Rounded b) { return a.value < b.value ? a : b; }
DIFFKERN_FN Rounded to_float(int32_t a) { return __int2float_rn(a); }
DIFFKERN_FN int32_t as_int(Rounded a) { return __float_as_int(a.value); }
DIFFKERN_FN Rounded as_float(int32_t a) { return __int_as_float(a); }

#else

}  // namespace diffkern
#include "simd.h"
namespace diffkern {

#endif

// c[0] + c[1] x + ... + c[n-1] x^(n-1), by Horner.
template <class F, int n>
DIFFKERN_FN F polynomial(F x, const float (&c)[n]) {
  F y = x * c[n - 1] + c[n - 2];
  DIFFKERN_UNROLL
  for (int k = n - 3; k >= 0; --k) y = y * x + c[k];
  return y;
}

}  // namespace diffkern
