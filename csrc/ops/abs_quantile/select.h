// Selection of the k-th smallest of many keys of 31 bits, by counting them four times, a byte at a time from the top.
// The keys of floats >= 0 are their bits, which are in the floats' order; NaN is above all others.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

constexpr int kBins = 256;
constexpr uint32_t kInfinityKey = 0x7F800000;

struct Selection {
  uint32_t rank;     // of the key, among those that begin as `prefix` does
  uint32_t prefix;   // its bits from `shift` up
  uint32_t equal;    // how many keys have these bits
  int shift;
};

DIFFKERN_FN Selection select_rank(uint32_t rank) { return {rank, 0, 0, 32}; }

// The byte that a key is counted by, or a negative number for one that begins otherwise.
DIFFKERN_FN int bin_of(const Selection& s, uint32_t key) {
  if (s.shift < 32 && key >> s.shift != s.prefix) return -1;
  return int(key >> (s.shift - 8) & (kBins - 1));
}

DIFFKERN_FN void narrow(Selection& s, const uint32_t* counts) {
  uint32_t bin = 0;
  while (bin < kBins - 1 && s.rank >= counts[bin]) s.rank -= counts[bin++];
  s.prefix = s.prefix << 8 | bin;
  s.equal = counts[bin];
  s.shift -= 8;
}

// Between a number and the next larger one, either of which may be infinite.
DIFFKERN_FN float between(float lower, float upper, double weight) {
  return lower == upper || weight == 0 ? lower : float(lower + weight * (double(upper) - lower));
}

}  // namespace diffkern
