// How attention is laid over warps, blocks and shared memory: pure functions of the sizes and the card.
//
// A block of threads owns some rows (queries forward, queries or keys backward), keeps their operands in shared memory
// and meets the tokens of the other side 64 at a time. Its warps are row_warps x column_warps: those of one row share
// its scores, and its sums lie across their registers, so that 16 rows of 512 channels fit without a spill.

#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "integers.h"

namespace diffkern::cuda {

constexpr int kTokens = 64;    // that a block meets at a time
constexpr int kChannels = 64;  // that a chunk in shared memory is wide: 128 bytes, or 256 of float32
constexpr int kAhead = 2;      // chunks on their way while one is in use

// Whether rows of so many channels are pieces of 16 bytes that tensor cores take. Operands of float32 of more than 256
// channels do not fit.
constexpr bool whole_pieces(DType dtype, int64_t channels) {
  return dtype == DType::f32 ? channels % 4 == 0 && channels <= 256 : channels % 8 == 0 && channels <= 512;
}

enum class TensorCores { none, tf32, bf16, f16, f16_turing };

// The tensor cores for such rows in code of that major compute capability; pieces: the rows are of aligned 16-byte pieces.
inline TensorCores tensor_cores_for(DType dtype, bool pieces, int major) {
  if (!pieces) return TensorCores::none;
  if (major < 8) return dtype == DType::f16 ? TensorCores::f16_turing : TensorCores::none;
  return dtype == DType::f32 ? TensorCores::tf32 : dtype == DType::f16 ? TensorCores::f16 : TensorCores::bf16;
}

// owners: operands of a block's own rows that it keeps, q forward, two backward. bytes: of an element.
template <int width_, int row_warps_, int column_warps_, int row_tiles_, int owners_, int bytes_ = 2>
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

  // Bytes in shared memory, in this order: all owners' rows, the ring, scores, and what warps tell each other.
  static constexpr int owned_chunk = bytes_ * rows * kChannels, owner = owned_chunk * chunks, owned = owners_ * owner;
  static constexpr int chunk = bytes_ * kTokens * kChannels, ring = slots * chunk;
  static constexpr int scores = column_warps > 1 ? bytes_ * rows * kTokens : 0;
  static constexpr int told = 4 * (owners_ > 1 ? 2 * kTokens : column_warps > 1 ? rows * column_warps : 0);
  static constexpr int shared_bytes = owned + ring + scores + told;
};

// Warps that an SM of sm_80 or sm_90 holds at a time, by the registers that ptxas gives them (no spill on any card):
//
//     channels         64   128   256   512
//     forward           8     8     8     8     16 and 12 where there are 64 queries or fewer
//     dk, dv            8     8     8     8
//     dq               12    16     8     8     the last 16 on sm_90
//
// For float32, whose ring is twice as large, sm_80 holds 4 to 8 and sm_90 8 to 12.
//
// Turing has 64 KiB of shared memory, the smallest card after it 99 KiB. Forward, a warp takes 32 rows where there are
// so many: a matrix of keys or values that it reads from shared memory then serves two products.
template <TensorCores cores, class Run>
auto with_forward_tiling(int64_t queries, int64_t channels, Run run) {
  if constexpr (cores == TensorCores::tf32) {
    if (channels <= 64) return run(Tiling<64, 4, 1, 1, 1, 4>{});
    if (channels <= 128) return run(Tiling<128, 4, 1, 1, 1, 4>{});
    return run(Tiling<256, 2, 2, 1, 1, 4>{});
  } else {
    if (channels <= 64) return queries > 64 ? run(Tiling<64, 4, 1, 2, 1>{}) : run(Tiling<64, 4, 1, 1, 1>{});
    if (channels <= 128) return queries > 64 ? run(Tiling<128, 4, 1, 2, 1>{}) : run(Tiling<128, 4, 1, 1, 1>{});
    if (channels <= 256) return run(Tiling<256, 4, 1, 1, 1>{});
    return run(Tiling<512, cores == TensorCores::f16_turing ? 2 : 4, 2, 1, 1>{});
  }
}

template <TensorCores cores, class Run>
auto with_backward_tiling(int64_t channels, Run run) {
  constexpr bool turing = cores == TensorCores::f16_turing;
  if constexpr (cores == TensorCores::tf32) {
    if (channels <= 64) return run(Tiling<64, 4, 1, 1, 2, 4>{});
    if (channels <= 128) return run(Tiling<128, 2, 2, 1, 2, 4>{});
    return run(Tiling<256, 1, 4, 1, 2, 4>{});
  } else {
    if (channels <= 64) return run(Tiling<64, 4, 1, 1, 2>{});
    if (channels <= 128) return run(Tiling<128, turing ? 2 : 4, 2, 1, 2>{});
    if (channels <= 256) return run(Tiling<256, turing ? 2 : 4, 2, 1, 2>{});
    return run(Tiling<512, turing ? 1 : 2, 4, 1, 2>{});
  }
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
inline int64_t row_blocks(int64_t tokens, int64_t heads, int64_t rows) { return divide_up(tokens, rows) * heads; }

template <class Tiling>
AttentionPlan plan_of(int64_t tokens, int64_t heads) {
  return {row_blocks(tokens, heads, Tiling::rows), 1, Tiling::rows, Tiling::threads, Tiling::shared_bytes};
}

inline AttentionPlan plan_attention_any(int64_t tokens, int64_t heads, int64_t channels) {
  const int64_t width = with_slice_width(channels, [](auto slice) { return int64_t(decltype(slice)::value); });
  return {row_blocks(tokens, heads, kTokens), divide_up(channels, width), kTokens, kAnyThreads, 0};
}

inline AttentionPlan plan_delta(int64_t queries, int64_t heads, int lanes) {
  const int rows = kDeltaThreads / lanes;
  return {row_blocks(queries * heads, 1, rows), 1, rows, kDeltaThreads, 0};
}

inline AttentionPlan plan_attention(TensorCores cores, int64_t queries, int64_t heads, int64_t channels) {
  const auto plan = [&](auto tiling) { return plan_of<decltype(tiling)>(queries, heads); };
  if (cores == TensorCores::none) return plan_attention_any(queries, heads, channels);
  if (cores == TensorCores::tf32) return with_forward_tiling<TensorCores::tf32>(queries, channels, plan);
  if (cores == TensorCores::f16_turing) return with_forward_tiling<TensorCores::f16_turing>(queries, channels, plan);
  return with_forward_tiling<TensorCores::f16>(queries, channels, plan);
}

// For dk and dv, or for dq.
inline AttentionPlan plan_attention_backward(TensorCores cores, int64_t tokens, int64_t heads, int64_t channels) {
  const auto plan = [&](auto tiling) { return plan_of<decltype(tiling)>(tokens, heads); };
  if (cores == TensorCores::none) return plan_attention_any(tokens, heads, channels);
  if (cores == TensorCores::tf32) return with_backward_tiling<TensorCores::tf32>(channels, plan);
  if (cores == TensorCores::f16_turing) return with_backward_tiling<TensorCores::f16_turing>(channels, plan);
  return with_backward_tiling<TensorCores::f16>(channels, plan);
}

}  // namespace diffkern::cuda
