// Standard normals for a run of consecutive elements of one sample.
//
// First the Philox words of the whole run, then the normals in their place: short loops whose rounds do not wait for
// each other keep a processor busier than one long chain of operations for each element does.

#pragma once

#include "math/normal.h"
#include "math/philox.h"

namespace diffkern {

// Registers in lockstep: Philox is one chain of multiplications, and it takes several at once to hide their latency.
constexpr int kChains = 4;
struct Chains {
  u64v r[kChains];
};

template <class F>
DIFFKERN_FN Chains each(F f) {
  Chains result;
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) result.r[i] = f(i);
  return result;
}

DIFFKERN_FN Chains multiply_low_halves(const Chains& a, uint32_t b) {
  return each([&](int i) __attribute__((always_inline)) { return multiply_low_halves(a.r[i], b); });
}
DIFFKERN_FN Chains operator>>(const Chains& a, int bits) {
  return each([&](int i) __attribute__((always_inline)) { return a.r[i] >> bits; });
}
DIFFKERN_FN Chains operator^(const Chains& a, const Chains& b) {
  return each([&](int i) __attribute__((always_inline)) { return a.r[i] ^ b.r[i]; });
}
DIFFKERN_FN Chains operator^(const Chains& a, const u64v& b) {
  return each([&](int i) __attribute__((always_inline)) { return a.r[i] ^ b; });
}

constexpr int kNormals = kChains * 2 * kLanes;  // what is made at a time: a Philox block of four in each half register

// Memory that is needed soon, to be asked for a little at a time, in step with normals that are being made: requests for
// all of it at once would fill the processor's queue, and the normals would wait behind them.
alignas(64) constexpr char kNothing[4 * kNormals] = {};
struct Wanted {
  const char* from = kNothing;
  int64_t size = 0;  // bytes that go with a normal: 4, or less, and then some is asked for twice rather than branch

  __attribute__((always_inline)) void ask(int first, int count) const {
    for (int i = 0; i < 4 * count; i += 64) __builtin_prefetch(from + first * size + i);
  }
};

// A sample's key and counter. The round keys lie in memory as whole registers, to be operands as they are.
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

// to[0, count): of each run of kLanes / 2 blocks a register of w0 and w2 in turn, then one of w1 and w3.
// The order of a run's blocks is that in which box_muller leaves their elements in order.
DIFFKERN_FN void philox_words(const NoiseAddress& address, int64_t first, int count, float* to, const Wanted& wanted) {
  const uint64_t block = uint64_t(first) / 4;
  u64v order;
  for (int i = 0; i < kLanes / 2; ++i) order[i] = i / 2 + i % 2 * (kLanes / 4);
  const u64v high = u64v{} + (block >> 32);
  u64v low = order + (block & 0xFFFFFFFFu);
  const auto all = [](u64v a) __attribute__((always_inline)) {
    return each([&](int) __attribute__((always_inline)) { return a; });
  };
  for (int n = 0; n < count; n += kNormals, to += kNormals) {
    wanted.ask(n, kNormals);
    const Chains c0 = each([&](int i) __attribute__((always_inline)) { return low + i * (kLanes / 2); });
    low += kChains * (kLanes / 2);
    const auto w = philox(Words<Chains>{c0, all(high), all(address.step), all(address.stream)}, address.keys);
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      store(to + 2 * i * kLanes, low_halves(w.w0.r[i], w.w2.r[i]));
      store(to + (2 * i + 1) * kLanes, low_halves(w.w1.r[i], w.w3.r[i]));
    }
  }
}

// The normals of words as philox_words leaves them, in place.
DIFFKERN_FN void box_muller(float* z, int count, const Wanted& by_radii, const Wanted& by_phases) {
  for (int i = 0; i < count; i += 2 * kLanes) {
    by_radii.ask(i, 2 * kLanes);
    store(z + i, radius<f32v>((u32v)load(z + i)));
  }
  for (int i = 0; i < count; i += 2 * kLanes) {
    by_phases.ask(i, 2 * kLanes);
    const f32v r = load(z + i);
    const CosSin<f32v> phase = cos_sin<f32v>((u32v)load(z + i + kLanes));
    const f32v even = r * phase.cos, odd = r * phase.sin;
    store(z + i, unpack_low(even, odd));
    store(z + i + kLanes, unpack_high(even, odd));
  }
}

// z[0, count) = elements [first, first + count) of the sample's noise; both are multiples of kNormals.
// Each of the three loops prefetches one of the operands that are read afterwards.
DIFFKERN_FN void normals(const NoiseAddress& address, int64_t first, int count, float* z, const Wanted& by_words = {},
                         const Wanted& by_radii = {}, const Wanted& by_phases = {}) {
  philox_words(address, first, count, z, by_words);
  box_muller(z, count, by_radii, by_phases);
}

}  // namespace diffkern
