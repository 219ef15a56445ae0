// Philox4x32-10 (Salmon et al. 2011): (counter, key) -> four random words, without state.

#pragma once

#include "lanes.h"

namespace diffkern {

// The words of one counter, each in the low half of a W: uint64_t, or a register of them. High halves are not words.
template <class W>
struct Words {
  W w0, w1, w2, w3;
};

DIFFKERN_FN uint64_t multiply_low_halves(uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }

template <class W>
DIFFKERN_FN Words<W> philox(Words<W> counter, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  auto [c0, c1, c2, c3] = counter;
  DIFFKERN_UNROLL
  for (int round = 0; round < 10; ++round) {
    W p0 = multiply_low_halves(c0, 0xD2511F53u), p1 = multiply_low_halves(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// What a counter's fourth word says the noise is for.
enum Stream : uint32_t { kInitial = 0, kReverseStep = 1, kForwardNoising = 2 };

}  // namespace diffkern
