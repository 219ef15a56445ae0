// The parameters of word_hash. CPU only.

#pragma once

#include <cstdint>

namespace diffkern {

// Order-free hashes of a function of one word over runs of codes: the proof that every machine has the same one.
struct WordHashParams {
  bool angle;      // cos and sin of the phase, or the radius
  uint64_t* hash;  // [items], each over kCodesPerHash codes
};
constexpr int64_t kCodesPerHash = int64_t(1) << 20;

}  // namespace diffkern
