// Standard normals for a run of consecutive elements of one sample, kNormals at a time.

#pragma once

#include "../math/normal.h"
#include "../math/philox.h"

namespace diffkern {

constexpr int kNormals = 4 * kLanes;  // what one call makes: kLanes Philox blocks of four

struct Normals {
  f32v z[4];  // in the order of the elements
};

// What all elements of a sample share. The round keys lie in memory as whole registers, to be operands as they are.
struct NoiseAddress {
  struct {
    u64v first[10], second[10];
  } keys;
  u64v step, stream;

  NoiseAddress(uint64_t seed, uint32_t step_word, uint32_t stream_word) {
    const RoundKeys words = round_keys(seed);
    for (int round = 0; round < 10; ++round) {
      keys.first[round] = u64v{} + words.first[round];
      keys.second[round] = u64v{} + words.second[round];
    }
    step = u64v{} + step_word;
    stream = u64v{} + stream_word;
  }
};

// Elements [first, first + kNormals) of a sample; first is a multiple of kNormals.
DIFFKERN_FN Normals normals(const NoiseAddress& address, int64_t first) {
  // Lane l computes block (l % 4) * (kLanes / 4) + l / 4: the transpose below then leaves the elements in order.
  // Even and odd lanes go through Philox apart, a word in each half register, and are merged after it.
  constexpr int kQuads = kLanes / 4;
  u64v even, odd;
  for (int i = 0; i < kLanes / 2; ++i) {
    even[i] = (2 * i % 4) * kQuads + 2 * i / 4;
    odd[i] = ((2 * i + 1) % 4) * kQuads + (2 * i + 1) / 4;
  }
  uint64_t block = uint64_t(first) / 4;
  u64v high = u64v{} + (block >> 32), low = u64v{} + (block & 0xFFFFFFFFu);
  Words<u64v> a = philox(Words<u64v>{low + even, high, address.step, address.stream}, address.keys);
  Words<u64v> b = philox(Words<u64v>{low + odd, high, address.step, address.stream}, address.keys);
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
