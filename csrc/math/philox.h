// Philox4x32-10 (Salmon et al. 2011): (counter, key) -> four random words, without state.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

// The words of one counter, each in the low half of a W: uint64_t, or a register of them. High halves are not words.
template <class W>
struct Words {
  W w0, w1, w2, w3;
};

DIFFKERN_FN uint64_t multiply_low_halves(uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }

// The key words of the ten rounds.
struct RoundKeys {
  uint32_t first[10], second[10];
};

DIFFKERN_FN RoundKeys round_keys(uint64_t key) {
  RoundKeys keys;
  DIFFKERN_UNROLL
  for (uint32_t round = 0; round < 10; ++round) {
    keys.first[round] = uint32_t(key) + round * 0x9E3779B9u;
    keys.second[round] = uint32_t(key >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

template <class W, class Keys>
DIFFKERN_FN Words<W> philox(Words<W> counter, const Keys& keys) {
  auto [c0, c1, c2, c3] = counter;
  DIFFKERN_UNROLL
  for (int round = 0; round < 10; ++round) {
    W p0 = multiply_low_halves(c0, 0xD2511F53u), p1 = multiply_low_halves(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ keys.first[round];
    c2 = (p0 >> 32) ^ c3 ^ keys.second[round];
    c1 = p1;
    c3 = p0;
  }
  return {c0, c1, c2, c3};
}

// The purpose of the noise: a counter's fourth word.
enum Stream : uint32_t { kInitial = 0, kReverseStep = 1, kForwardNoising = 2, kKnown = 6 };

}  // namespace diffkern
