// How attention is laid over warps, blocks and shared memory: pure functions of the sizes and the card.
//
// A block of threads owns some rows (queries forward, queries or keys backward), keeps their operands in shared memory
// and meets the tokens of the other side 64 at a time. Its warps are row_warps x column_warps: those of one row share
// its scores, and its sums lie across their registers, so that 16 rows of 512 channels fit without a spill.

#pragma once

#include <cstdint>
#include <type_traits>

#include "../ops.h"

namespace diffkern::cuda {

constexpr int kTokens = 64;    // that a block meets at a time
constexpr int kChannels = 64;  // that a chunk in shared memory is wide: 128 bytes, so that a row is every bank once
constexpr int kAhead = 2;      // chunks on their way while one is in use
constexpr int kMaxChannels = 512;
constexpr int kPiece = 8;  // 16-bit values in 16 bytes
constexpr bool whole_pieces(int64_t channels) { return channels % kPiece == 0 && channels <= kMaxChannels; }

// owners: operands of a block's own rows that it keeps, q forward, two backward.
template <int width_, int row_warps_, int column_warps_, int row_tiles_, int owners_>
struct Tiling {
  static constexpr int width = width_;  // channels, rounded up
  static constexpr int row_warps = row_warps_, column_warps = column_warps_;
  static constexpr int row_tiles = row_tiles_;  // of 16 rows a warp has
  static constexpr int rows = 16 * row_tiles * row_warps;
  static constexpr int threads = 32 * row_warps * column_warps;
  static constexpr int chunks = width / kChannels;
  // Backward meets each chunk twice: where two are all, they stay, and the ring has room for them and the next two.
  static constexpr bool held = owners_ > 1 && chunks == 1;
  static constexpr int slots = held ? 2 + kAhead : 1 + kAhead;

  // Elements of 16 bits in shared memory, in this order; then float32 that the warps tell each other.
  static constexpr int owned = owners_ * rows * width;
  static constexpr int ring = slots * kTokens * kChannels;
  static constexpr int scores = column_warps > 1 ? rows * kTokens : 0;
  static constexpr int floats = owners_ > 1 ? 2 * kTokens : column_warps > 1 ? rows * column_warps : 0;
  static constexpr int shared_bytes = 2 * (owned + ring + scores) + 4 * floats;
};

// Warps that an SM of sm_80 or sm_90 holds at a time, by the registers that ptxas gives them (no spill on any card):
//
//     channels         64   128   256   512
//     forward           8     8     8     8     16 and 12 where there are 64 queries or fewer
//     dk, dv            8     8     8     8
//     dq               12    16     8     8
//
// Turing has 64 KiB of shared memory, the smallest card after it 99 KiB. Forward, a warp takes 32 rows where there are
// so many: a matrix of keys or values that it reads from shared memory then serves two products.
template <bool turing, class Run>
auto with_forward_tiling(int64_t queries, int64_t channels, Run run) {
  if (channels <= 64) return queries > 64 ? run(Tiling<64, 4, 1, 2, 1>{}) : run(Tiling<64, 4, 1, 1, 1>{});
  if (channels <= 128) return queries > 64 ? run(Tiling<128, 4, 1, 2, 1>{}) : run(Tiling<128, 4, 1, 1, 1>{});
  if (channels <= 256) return run(Tiling<256, 4, 1, 1, 1>{});
  return run(Tiling<512, turing ? 2 : 4, 2, 1, 1>{});
}

template <bool turing, class Run>
auto with_backward_tiling(int64_t channels, Run run) {
  if (channels <= 64) return run(Tiling<64, 4, 1, 1, 2>{});
  if (channels <= 128) return run(Tiling<128, turing ? 2 : 4, 2, 1, 2>{});
  if (channels <= 256) return run(Tiling<256, turing ? 2 : 4, 2, 1, 2>{});
  return run(Tiling<512, turing ? 1 : 2, 4, 1, 2>{});
}

// Without tensor cores a block has 64 rows, and so many channels of their sums: the blocks along y share the channels.
template <class Run>
auto with_slice_width(int64_t channels, Run run) {
  if (channels <= 64) return run(std::integral_constant<int, 64>{});
  if (channels <= 128) return run(std::integral_constant<int, 128>{});
  if (channels <= 256) return run(std::integral_constant<int, 256>{});
  return run(std::integral_constant<int, 512>{});
}

constexpr int kAnyThreads = 256, kDeltaThreads = 256;
constexpr int kDeltaLanes = 8, kAnyDeltaLanes = 32;  // of a query: grad_out . out

struct AttentionPlan {
  int64_t blocks, slices;               // along x and y
  int32_t rows, threads, shared_bytes;  // of a block
};

// heads: of all samples. tokens: the rows', queries forward and for their gradient, keys for theirs
inline int64_t row_blocks(int64_t tokens, int64_t heads, int64_t rows) { return (tokens + rows - 1) / rows * heads; }

template <class Tiling>
AttentionPlan plan_of(int64_t tokens, int64_t heads) {
  return {row_blocks(tokens, heads, Tiling::rows), 1, Tiling::rows, Tiling::threads, Tiling::shared_bytes};
}

inline AttentionPlan plan_attention_any(int64_t tokens, int64_t heads, int64_t channels) {
  const int64_t width = with_slice_width(channels, [](auto slice) { return int64_t(decltype(slice)::value); });
  return {row_blocks(tokens, heads, kTokens), (channels + width - 1) / width, kTokens, kAnyThreads, 0};
}

inline AttentionPlan plan_delta(int64_t queries, int64_t heads, int lanes) {
  const int rows = kDeltaThreads / lanes;
  return {row_blocks(queries * heads, 1, rows), 1, rows, kDeltaThreads, 0};
}

enum class TensorCores { none, bf16, f16, f16_turing };

// What a card of that major compute capability has for such rows; pieces: they are of aligned 16-byte pieces.
inline TensorCores tensor_cores_for(DType dtype, bool pieces, int major) {
  if (!pieces || dtype == DType::f32) return TensorCores::none;
  if (major < 8) return dtype == DType::f16 ? TensorCores::f16_turing : TensorCores::none;
  return dtype == DType::f16 ? TensorCores::f16 : TensorCores::bf16;
}

inline AttentionPlan plan_attention(TensorCores cores, int64_t queries, int64_t heads, int64_t channels) {
  const auto plan = [&](auto tiling) { return plan_of<decltype(tiling)>(queries, heads); };
  if (cores == TensorCores::none) return plan_attention_any(queries, heads, channels);
  if (cores == TensorCores::f16_turing) return with_forward_tiling<true>(queries, channels, plan);
  return with_forward_tiling<false>(queries, channels, plan);
}

// Of dk and dv, or of dq.
inline AttentionPlan plan_attention_backward(TensorCores cores, int64_t tokens, int64_t heads, int64_t channels) {
  const auto plan = [&](auto tiling) { return plan_of<decltype(tiling)>(tokens, heads); };
  if (cores == TensorCores::none) return plan_attention_any(tokens, heads, channels);
  if (cores == TensorCores::f16_turing) return with_backward_tiling<true>(channels, plan);
  return with_backward_tiling<false>(channels, plan);
}

}  // namespace diffkern::cuda
