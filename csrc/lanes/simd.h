// Registers of floats: one set of names for AVX-512, AVX2 and everything else.
//
// f32v, i32v, u32v hold kLanes values and u64v holds half as many; they are the compiler's vector types, so that
// + - * & ^ >> < and `mask ? a : b` work on them as on scalars. The rest of what kernels need is below.
// The host's part of lanes.h, to be included through it.
// All is static: a kernel compiled for AVX-512 shares no symbol with one compiled for less.

#pragma once

#include <cstdint>
#include <cstring>

// DIFFKERN_PORTABLE makes an x86-64 any other machine: for tests of what those compile.
#if defined(__x86_64__) && !defined(DIFFKERN_PORTABLE)
#define DIFFKERN_SSE2
#include <immintrin.h>
#endif

namespace diffkern {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint64_t u64v __attribute__((vector_size(4 * kLanes)));

template <>
struct Lanes<f32v> {
  using I = i32v;
  using U = u32v;
};

DIFFKERN_FN f32v broadcast(float a) { return a - f32v{}; }  // 0 + a would be an addition: it turns -0 into 0

DIFFKERN_FN f32v load(const float* p) {
  f32v a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

DIFFKERN_FN void store(float* p, f32v a) { std::memcpy(p, &a, sizeof a); }

DIFFKERN_FN f32v to_float(i32v a) { return __builtin_convertvector(a, f32v); }
DIFFKERN_FN i32v as_int(f32v a) { return (i32v)a; }
DIFFKERN_FN f32v as_float(i32v a) { return (f32v)a; }

// low_halves(a, b) holds the low halves of a's values and b's in turn.
// load(p, count) and store(p, a, count) touch the first `count` values only; what is not loaded is 0.
#if defined(__AVX512F__)

DIFFKERN_FN f32v sqrt(f32v a) { return (f32v)_mm512_sqrt_ps((__m512)a); }
DIFFKERN_FN f32v load(const float* p, int count) { return (f32v)_mm512_maskz_loadu_ps((1u << count) - 1, p); }
DIFFKERN_FN void store(float* p, f32v a, int count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)a); }
DIFFKERN_FN f32v max(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
DIFFKERN_FN f32v min(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
DIFFKERN_FN f32v multiply_add(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
DIFFKERN_FN f32v times_power_of_2(f32v a, f32v n) { return (f32v)_mm512_scalef_ps((__m512)a, (__m512)n); }
DIFFKERN_FN f32v from_nearest_whole(f32v a) {
  return (f32v)_mm512_reduce_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT);
}
DIFFKERN_FN f32v reciprocal_approx(f32v a) { return (f32v)_mm512_rcp14_ps((__m512)a); }  // within 2^-14 of itself
DIFFKERN_FN u64v multiply_low_halves(u64v a, uint32_t b) {
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
DIFFKERN_FN f32v low_halves(u64v a, u64v b) {
  return (f32v)_mm512_mask_moveldup_ps((__m512)a, 0xAAAA, (__m512)b);
}
DIFFKERN_FN f32v unpack_low(f32v a, f32v b) { return (f32v)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
DIFFKERN_FN f32v unpack_high(f32v a, f32v b) { return (f32v)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
DIFFKERN_FN f32v unpack_low_pairs(f32v a, f32v b) { return (f32v)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
DIFFKERN_FN f32v unpack_high_pairs(f32v a, f32v b) { return (f32v)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
DIFFKERN_FN float reduce_add(f32v a) { return _mm512_reduce_add_ps((__m512)a); }
DIFFKERN_FN float reduce_max(f32v a) { return _mm512_reduce_max_ps((__m512)a); }

#elif defined(__AVX2__)

DIFFKERN_FN f32v sqrt(f32v a) { return (f32v)_mm256_sqrt_ps((__m256)a); }
DIFFKERN_FN __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DIFFKERN_FN f32v load(const float* p, int count) { return (f32v)_mm256_maskload_ps(p, first_lanes(count)); }
DIFFKERN_FN void store(float* p, f32v a, int count) { _mm256_maskstore_ps(p, first_lanes(count), (__m256)a); }
DIFFKERN_FN f32v max(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
DIFFKERN_FN f32v min(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
DIFFKERN_FN f32v multiply_add(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DIFFKERN_FN u64v multiply_low_halves(u64v a, uint32_t b) {
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
DIFFKERN_FN f32v low_halves(u64v a, u64v b) {
  return (f32v)_mm256_blend_ps((__m256)a, _mm256_moveldup_ps((__m256)b), 0xAA);
}
DIFFKERN_FN f32v unpack_low(f32v a, f32v b) { return (f32v)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
DIFFKERN_FN f32v unpack_high(f32v a, f32v b) { return (f32v)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
DIFFKERN_FN f32v unpack_low_pairs(f32v a, f32v b) { return (f32v)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
DIFFKERN_FN f32v unpack_high_pairs(f32v a, f32v b) { return (f32v)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }

#else  // any machine, 128 bits

DIFFKERN_FN f32v sqrt(f32v a) {
#if defined(DIFFKERN_SSE2)
  return (f32v)_mm_sqrt_ps((__m128)a);
#else
  return f32v{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
#endif
}
DIFFKERN_FN f32v load(const float* p, int count) {
  f32v a{};
  std::memcpy(&a, p, count * sizeof *p);
  return a;
}
DIFFKERN_FN void store(float* p, f32v a, int count) { std::memcpy(p, &a, count * sizeof *p); }
DIFFKERN_FN f32v max(f32v a, f32v b) { return a > b ? a : b; }
DIFFKERN_FN f32v min(f32v a, f32v b) { return a < b ? a : b; }
DIFFKERN_FN f32v multiply_add(f32v a, f32v b, f32v c) { return a * b + c; }  // rounds twice
DIFFKERN_FN u64v multiply_low_halves(u64v a, uint32_t b) {
#if defined(DIFFKERN_SSE2)
  return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}
DIFFKERN_FN f32v low_halves(u64v a, u64v b) { return (f32v)((a & 0xFFFFFFFFu) | (b << 32)); }
DIFFKERN_FN f32v unpack_low(f32v a, f32v b) { return f32v{a[0], b[0], a[1], b[1]}; }
DIFFKERN_FN f32v unpack_high(f32v a, f32v b) { return f32v{a[2], b[2], a[3], b[3]}; }
DIFFKERN_FN f32v unpack_low_pairs(f32v a, f32v b) { return f32v{a[0], a[1], b[0], b[1]}; }
DIFFKERN_FN f32v unpack_high_pairs(f32v a, f32v b) { return f32v{a[2], a[3], b[2], b[3]}; }

#endif

// In each 128 bits of the four, which are a 4x4 matrix: rows become columns.
DIFFKERN_FN void transpose_quads(f32v (&x)[4]) {
  const f32v low01 = unpack_low(x[0], x[1]), high01 = unpack_high(x[0], x[1]);
  const f32v low23 = unpack_low(x[2], x[3]), high23 = unpack_high(x[2], x[3]);
  x[0] = unpack_low_pairs(low01, low23), x[1] = unpack_high_pairs(low01, low23);
  x[2] = unpack_low_pairs(high01, high23), x[3] = unpack_high_pairs(high01, high23);
}

#if !defined(__AVX512F__)
// a less the nearest whole number
DIFFKERN_FN f32v from_nearest_whole(f32v a) {
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: a sum with it is a whole number
  return a - ((a + kRound) - kRound);
}
DIFFKERN_FN f32v reciprocal_approx(f32v a) { return 1.0f / a; }
// a 2^n for whole n; 0 below 2^-126, infinity above 2^127
DIFFKERN_FN f32v times_power_of_2(f32v a, f32v n) {
  n = n < -127.0f ? -127.0f : n;
  n = n > 128.0f ? 128.0f : n;
  return a * as_float((as_int(n + 12582912.0f) << 23) + 0x3F800000);  // the sum's low bits hold n
}
DIFFKERN_FN float reduce_add(f32v a) {  // halves onto halves, as AVX-512's does
  float lanes[kLanes];
  store(lanes, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
DIFFKERN_FN float reduce_max(f32v a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
#endif

}  // namespace diffkern
