// Standard normals for a run of consecutive elements of one sample, kNormals at a time.

#pragma once

#include "../math/normal.h"
#include "../math/philox.h"

namespace diffkern {

constexpr int kNormals = 4 * kLanes;  // what one call makes: kLanes Philox blocks of four

struct Normals {
  f32v z[4];  // in the order of the elements
};

// Elements [first, first + kNormals) of a sample; first is a multiple of kNormals.
DIFFKERN_FN Normals normals(uint64_t seed, uint32_t step, uint32_t stream, int64_t first) {
  // Lane l computes block (l % 4) * (kLanes / 4) + l / 4: the transpose below then leaves the elements in order.
  // Even and odd lanes go through Philox apart, a word in each half register, and are merged after it.
  constexpr int kQuads = kLanes / 4;
  u64v even, odd;
  for (int i = 0; i < kLanes / 2; ++i) {
    even[i] = (2 * i % 4) * kQuads + 2 * i / 4;
    odd[i] = ((2 * i + 1) % 4) * kQuads + (2 * i + 1) / 4;
  }
  uint64_t block = uint64_t(first) / 4;
  u64v zero{}, high = zero + (block >> 32), low = zero + (block & 0xFFFFFFFFu), key_step = zero + step,
       key_stream = zero + stream;
  Words<u64v> a = philox(Words<u64v>{low + even, high, key_step, key_stream}, seed);
  Words<u64v> b = philox(Words<u64v>{low + odd, high, key_step, key_stream}, seed);
  auto merged = [](u64v a, u64v b) __attribute__((always_inline)) { return (u32v)((a & 0xFFFFFFFFu) | (b << 32)); };

  f32v r0 = radius<f32v>(merged(a.w0, b.w0)), r2 = radius<f32v>(merged(a.w2, b.w2));
  CosSin<f32v> p1 = cos_sin<f32v>(merged(a.w1, b.w1)), p3 = cos_sin<f32v>(merged(a.w3, b.w3));
  f32v z0 = r0 * p1.cos, z1 = r0 * p1.sin, z2 = r2 * p3.cos, z3 = r2 * p3.sin;

  f32v low01 = unpack_low(z0, z1), high01 = unpack_high(z0, z1), low23 = unpack_low(z2, z3),
       high23 = unpack_high(z2, z3);
  return {{unpack_low_pairs(low01, low23), unpack_high_pairs(low01, low23), unpack_low_pairs(high01, high23),
           unpack_high_pairs(high01, high23)}};
}

}  // namespace diffkern
