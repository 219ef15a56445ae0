// A warp's use of the tensor cores: 16-byte copies into shared memory, tiles of it into registers, products.
//
// mma.sync.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), with g = lane / 4 and q = lane % 4:
//   A  16 x 16  four registers of two 16-bit values: rows g and g + 8, columns 2q, 2q + 1, then both rows 8 columns on
//   B  16 x 8   two registers: rows 2q, 2q + 1 and 8 rows on, column g
//   C  16 x 8   four floats: row g, columns 2q, 2q + 1, then row g + 8
// So the C of two products side by side, rounded and packed, is an A.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "lanes/lanes.h"

namespace diffkern::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kTuring = false;
#else
constexpr bool kTuring = true;  // sm_75: no asynchronous copies, products half as deep, and none of bfloat16
#endif

DIFFKERN_FN uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, or zeros. On Turing they are there at once, else after wait_for_copies.
DIFFKERN_FN void copy_16_bytes(uint32_t to, const void* from, bool inside) {
  if constexpr (kTuring) {
    const uint4 value = inside ? *static_cast<const uint4*>(from) : uint4{};
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0) : "memory");
  }
}

DIFFKERN_FN void commit_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `pending` of the committed groups of copies of this thread are on their way.
template <int pending>
DIFFKERN_FN void wait_for_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}

// 16 bytes from shared to global memory.
DIFFKERN_FN void write_16_bytes(void* to, uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(from) : "memory");
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

DIFFKERN_FN uint32_t load_word(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

DIFFKERN_FN void load_two_words(uint32_t& first, uint32_t& second, uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(from) : "memory");
}

// Four 8 x 8 matrices of 16-bit values, or 8 x 4 of 32-bit ones: lane i gives the address of row i % 8 of matrix i / 8.
DIFFKERN_FN void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

DIFFKERN_FN void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// c += a b
template <class T>
DIFFKERN_FN void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define DIFFKERN_MMA(shape, type, ...) \
  "mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " __VA_ARGS__ ", {%0, %1, %2, %3};"

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kTuring) {
    asm volatile(DIFFKERN_MMA("m16n8k8", "f16", "{%4, %5}, {%6}")
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(DIFFKERN_MMA("m16n8k8", "f16", "{%4, %5}, {%6}")
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
  } else {
    asm volatile(DIFFKERN_MMA("m16n8k16", "f16", "{%4, %5, %6, %7}, {%8, %9}")
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  if constexpr (!kTuring)
    asm volatile(DIFFKERN_MMA("m16n8k16", "bf16", "{%4, %5, %6, %7}, {%8, %9}")
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a = big + small, each of the 11 bits that a tensor core takes of a float32.
struct Split {
  uint32_t big, small;

  __device__ __forceinline__ explicit Split(uint32_t word) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(big) : "f"(__uint_as_float(word)));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(small) : "f"(__uint_as_float(word) - __uint_as_float(big)));
  }
};

// float32 by three TF32 products, big big + big small + small big: float32 but for its last bit (3xTF32).
template <>
__device__ __forceinline__ void multiply_add<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (!kTuring) {
    const Split x0(a[0]), x1(a[1]), x2(a[2]), x3(a[3]), y0(b0), y1(b1);
    const auto add = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
      asm volatile(DIFFKERN_MMA("m16n8k8", "tf32", "{%4, %5, %6, %7}, {%8, %9}")
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    };
    add(x0.small, x1.small, x2.small, x3.small, y0.big, y1.big);
    add(x0.big, x1.big, x2.big, x3.big, y0.small, y1.small);
    add(x0.big, x1.big, x2.big, x3.big, y0.big, y1.big);
  }
}

#undef DIFFKERN_MMA

// Two floats rounded to T, the first in the low half.
template <class T>
DIFFKERN_FN uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// Two floats as T's, side by side in shared memory.
template <class T>
DIFFKERN_FN void store_two(uint32_t to, float first, float second) {
  if constexpr (sizeof(T) == 2)
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(to), "r"(pack<T>(first, second)) : "memory");
  else
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(to), "f"(first), "f"(second) : "memory");
}

}  // namespace diffkern::cuda
