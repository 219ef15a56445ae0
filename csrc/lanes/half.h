// 16-bit floats in memory, float in registers: loads are exact, stores round once, to nearest even.

#pragma once

#include "lanes.h"

namespace diffkern {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));

DIFFKERN_FN i32v load_16_bits(const void* p) {
#if defined(__AVX512F__)
  return (i32v)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (i32v)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  u16v a;
  std::memcpy(&a, p, sizeof a);
  return __builtin_convertvector(a, i32v);
#endif
}

DIFFKERN_FN void store_16_bits(void* p, i32v a) {
  u16v low = __builtin_convertvector((u32v)a, u16v);
  std::memcpy(p, &low, sizeof low);
}

DIFFKERN_FN f32v load(const BFloat16* p) { return as_float(load_16_bits(p) << 16); }

DIFFKERN_FN void store(BFloat16* p, f32v a) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)a);  // what is below 2^-126 to 0
  std::memcpy(p, &rounded, sizeof rounded);
#else
  i32v bits = as_int(a);
  i32v rounded = i32v((u32v)bits + 0x7FFFu + ((u32v)bits >> 16 & 1u)) >> 16;
  store_16_bits(p, a == a ? rounded : (bits >> 16 | 0x40));
#endif
}

// a less what it is rounded to
DIFFKERN_FN f32v less_bfloat16(f32v a) {
#if defined(__AVX512BF16__)
  return a - as_float((i32v)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a)) << 16);
#else
  BFloat16 rounded[kLanes];
  store(rounded, a);
  return a - load(rounded);
#endif
}

// a as the sum of so many, `apart` from each other: each the nearest to what those before it leave. Three are exact
// (24 bits), two within 2^-16 of it.
template <int terms>
DIFFKERN_FN void store_terms(BFloat16* p, int64_t apart, f32v a) {
#pragma GCC unroll 3
  for (int i = 0; i < terms; ++i, p += apart) {
    store(p, a);
    if (i + 1 < terms) a = less_bfloat16(a);
  }
}

// In each lane a's nearest bfloat16 and, in the high half, b's
DIFFKERN_FN i32v pair_of(f32v a, f32v b) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInTurn[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return (i32v)_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), both);
#else
  BFloat16 halves[2][kLanes];
  store(halves[0], a);
  store(halves[1], b);
  return load_16_bits(halves[0]) | load_16_bits(halves[1]) << 16;
#endif
}

// The terms of a and b, in turn.
template <int terms>
DIFFKERN_FN void store_terms(BFloat16* p, int64_t apart, f32v a, f32v b) {
#pragma GCC unroll 3
  for (int i = 0; i < terms; ++i, p += apart) {
    const i32v pair = pair_of(a, b);
    std::memcpy(p, &pair, sizeof pair);
    a = a - as_float(pair << 16);
    b = b - as_float(pair & int32_t(0xFFFF0000));
  }
}

DIFFKERN_FN f32v load(const BFloat16* p, int count) {
  BFloat16 all[kLanes] = {};
  std::memcpy(all, p, count * sizeof *p);
  return load(all);
}

DIFFKERN_FN void store(BFloat16* p, f32v a, int count) {
  BFloat16 all[kLanes];
  store(all, a);
  std::memcpy(p, all, count * sizeof *p);
}

#if defined(__AVX512F__)

DIFFKERN_FN f32v load(const Float16* p) { return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
DIFFKERN_FN void store(Float16* p, f32v a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__F16C__)

DIFFKERN_FN f32v load(const Float16* p) { return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
DIFFKERN_FN void store(Float16* p, f32v a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
}

#else

DIFFKERN_FN f32v load(const Float16* p) {
  i32v h = load_16_bits(p), magnitude = (h & 0x7FFF) << 13;
  f32v finite = as_float(magnitude) * 0x1p112f;  // moves the exponent's bias, exact for subnormals too
  i32v special = magnitude | 0x7F800000;         // infinity and NaN
  return as_float((magnitude >= 0x7C00 << 13 ? special : as_int(finite)) | (h & 0x8000) << 16);
}

DIFFKERN_FN void store(Float16* p, f32v a) {
  i32v sign = (as_int(a) >> 16) & 0x8000, magnitude = as_int(a) & 0x7FFFFFFF;
  // subnormal halves: an addition that leaves the rounded value in the low bits
  i32v subnormal = as_int(as_float(magnitude) + 0.5f) - as_int(broadcast(0.5f));
  i32v normal = (magnitude + (((127 - 15) * -1) << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  i32v special = magnitude > 0x7F800000 ? 0x7E00 | ((magnitude >> 13) & 0x3FF) : i32v{} + 0x7C00;
  i32v half = magnitude < (113 << 23) ? subnormal : normal;
  store_16_bits(p, sign | (magnitude >= 0x47800000 ? special : half));
}

#endif

}  // namespace diffkern
