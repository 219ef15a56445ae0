// Shared by attention's forward and backward on tensor cores: chunks of 64 tokens x 64 channels that stream
// through a ring in shared memory, and the two products of a warp with a chunk.
//
// A chunk's row is 128 bytes, of which 16-byte piece j lies at place j ^ (row % 8), so that the eight rows of a matrix
// that ldmatrix reads, and the eight pieces of a row that a copy writes, are in different banks. Of float32 a row is
// twice as long, and row % 8 has its bits mixed, so that of rows 2q, of rows 2q + 1, of rows 0..3 and of rows 4..7 two
// pieces each are in different banks.

#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/mma.cuh"
#include "params.h"
#include "plan.h"

namespace diffkern::cuda {

// cuda_any.cu: every dtype, stride and number of channels, without tensor cores.
const char* attention_any(const AttentionParams&, Stream);
const char* attention_backward_any(const AttentionParams&, Stream);

template <class T>
constexpr int kPieces = kChannels / kVector<T>;  // of a row of a chunk, of 16 bytes
template <class T>
constexpr int kDepth = 32 / sizeof(T);  // of one product: two pieces

// The tokens of one head.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int count;
};

template <class T>
DIFFKERN_FN Rows<T> rows_of(const HeadsView& x, int64_t sample, int64_t head, int64_t count) {
  return {static_cast<T*>(x.data) + sample * x.sample_stride + head * x.head_stride, x.token_stride, int(count)};
}

// Which rows of which head a block owns. Blocks of one head follow each other: its keys and values stay in L2.
struct Place {
  int64_t sample, head;
  int first;
};

DIFFKERN_FN Place place_of(int64_t block, int64_t heads, int64_t tokens, int rows) {
  const int64_t per_head = (tokens + rows - 1) / rows, item = block / per_head;
  return {item / heads, item % heads, int(block % per_head) * rows};
}

// The address of piece `piece` of row `row` of a chunk.
template <class T>
DIFFKERN_FN uint32_t at(uint32_t chunk, int row, int piece) {
  const int mix = sizeof(T) == 2 ? row & 7 : (row & 2) << 1 | ((row << 1 ^ row >> 1) & 2) | (row >> 2 & 1);
  return chunk + (row * kPieces<T> + (piece ^ mix)) * 16;
}

// Starts to copy `tokens` tokens from `first`, 64 channels from `channel`; zeros where there are none.
template <int tokens, int threads, class T>
DIFFKERN_FN void fetch(uint32_t chunk, const Rows<T>& rows, int first, int channel, int channels) {
  using Element = std::remove_const_t<T>;
  constexpr int pieces = kPieces<Element>;
  static_assert(tokens * pieces % threads == 0);
  const int piece = threadIdx.x % pieces, offset = channel + piece * kVector<Element>;
  const bool wide = offset < channels;
#pragma unroll
  for (int i = 0; i < tokens * pieces / threads; ++i) {
    const int row = threadIdx.x / pieces + i * (threads / pieces);
    const bool inside = wide && first + row < rows.count;
    const T* from = rows.data + (inside ? (first + row) * rows.stride + offset : 0);
    copy_16_bytes(at<Element>(chunk, row, piece), from, inside);
  }
}

// The address of the chunk with that channel, among the chunks of rows that a block owns.
template <class Tiling>
DIFFKERN_FN uint32_t owned_chunk(uint32_t owned, int channel) {
  return owned + channel / kChannels * Tiling::owned_chunk;
}

// All channels of the rows that a block owns, chunk after chunk.
template <class Tiling, class T>
DIFFKERN_FN void fetch_owned(uint32_t owned, const Rows<T>& rows, int first, int channels) {
  for (int channel = 0; channel < channels; channel += kChannels)
    fetch<Tiling::rows, Tiling::threads>(owned_chunk<Tiling>(owned, channel), rows, first, channel, channels);
}

// The chunks in the order in which a kernel uses them, two copies ahead of it: for each 64 tokens, for each part, all
// channels. Bit i of kOrder says whether part i is of the second tensor.
template <class Tiling, class T, int kParts, int kOrder>
class Ring {
 public:
  __device__ __forceinline__ Ring(uint32_t slots, const Rows<T>& first, const Rows<T>& second, int channels)
      : slots_(slots), first_(first), second_(second), channels_(channels) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch_into(i);
  }

  // The next chunk, there for all threads. One before it may be overwritten from now on: the last, or of those that are
  // held the last but one.
  __device__ __forceinline__ uint32_t next() {
    wait_for_copies<kAhead - 1>();
    __syncthreads();
    fetch_into(wrapped(read_ + kAhead));
    const uint32_t chunk = slots_ + read_ * Tiling::chunk;
    read_ = wrapped(read_ + 1);
    return chunk;
  }

 private:
  static __device__ __forceinline__ int wrapped(int slot) { return slot < Tiling::slots ? slot : slot - Tiling::slots; }

  __device__ __forceinline__ void fetch_into(int slot) {
    if (token_ < first_.count) {
      const bool second = kOrder >> part_ & 1;
      const Rows<T> rows = {second ? second_.data : first_.data, second ? second_.stride : first_.stride, first_.count};
      fetch<kTokens, Tiling::threads>(slots_ + slot * Tiling::chunk, rows, token_, channel_, channels_);
      channel_ += kChannels;
      if (channel_ >= channels_) {
        channel_ = 0;
        if (++part_ == kParts) {
          part_ = 0;
          token_ += kTokens;
        }
      }
    }
    commit_copies();  // also where there is nothing left, so that the number of groups says which chunk is there
  }

  uint32_t slots_;
  Rows<T> first_, second_;
  int channels_;
  int token_ = 0, part_ = 0, channel_ = 0;  // of the next copy
  int read_ = 0;                            // the slot of the next chunk
};

// A warp's place in its block.
template <class Tiling>
struct Warp {
  int lane = threadIdx.x % 32;
  int row = threadIdx.x / 32 / Tiling::column_warps * (16 * Tiling::row_tiles);  // its first
  int column_warp = threadIdx.x / 32 % Tiling::column_warps;
  int g = lane / 4, q = lane % 4;
};

// The share of 64 tokens, or of 64 channels, that a warp has: kShare / 8 products side by side.
template <class Tiling>
constexpr int kShare = 64 / Tiling::column_warps;

template <class Tiling>
using Scores = float[Tiling::row_tiles][kShare<Tiling> / 8][4];

// A warp's rows of 64 columns, as A's. Of float32 an A's column q is column 2q of its eight, and q + 4 is 2q + 1, so
// that scores are A's where they are.
template <class T, class Tiling>
using Operand = uint32_t[Tiling::row_tiles][64 / kDepth<T>][4];

// s += owned chunk^T, over the 64 channels of a chunk or those that there are.
template <class T, class Tiling>
DIFFKERN_FN void multiply_transposed(Scores<Tiling>& s, uint32_t owned, uint32_t chunk, int channels) {
  const Warp<Tiling> warp;
  const int token = warp.column_warp * kShare<Tiling> + warp.lane % 8 + warp.lane / 16 * 8;
#pragma unroll 4  // float32 has 8 products here: unrolled, their addresses would not fit into the registers
  for (int k = 0; k < kChannels / kDepth<T>; ++k) {
    if (k * kDepth<T> >= channels) break;
    uint32_t a[Tiling::row_tiles][4];
#pragma unroll
    for (int m = 0; m < Tiling::row_tiles; ++m)
      load_matrices(a[m], at<T>(owned, warp.row + m * 16 + warp.lane % 16, 2 * k + warp.lane / 16));
#pragma unroll
    for (int n = 0; n < kShare<Tiling> / 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, at<T>(chunk, token + n * 8, 2 * k + warp.lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < Tiling::row_tiles; ++m) {
        multiply_add<T>(s[m][n], a[m], b[0], b[1]);
        multiply_add<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sum += p chunk, over 64 tokens, for the warp's share of the 64 channels of a chunk or of those that there are.
template <class T, class Tiling>
DIFFKERN_FN void multiply(Scores<Tiling>& sum, const Operand<T, Tiling>& p, uint32_t chunk, int channels) {
  const Warp<Tiling> warp;
  const int share = warp.column_warp * kShare<Tiling>;
#pragma unroll
  for (int n = 0; n < kShare<Tiling> / 8; n += 2) {
    if (share + n * 8 >= channels) break;
#pragma unroll
    for (int k = 0; k < kTokens / kDepth<T>; ++k) {
      uint32_t b[4];
      if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(b, at<T>(chunk, k * 16 + warp.lane % 16, share / 8 + n + warp.lane / 16));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          b[i] = load_word(at<T>(chunk, k * 8 + warp.q * 2 + i % 2, share / 4 + 2 * (n + i / 2) + warp.g / 4) +
                           warp.g % 4 * 4);
      }
#pragma unroll
      for (int m = 0; m < Tiling::row_tiles; ++m) {
        multiply_add<T>(sum[m][n], p[m][k], b[0], b[1]);
        multiply_add<T>(sum[m][n + 1], p[m][k], b[2], b[3]);
      }
    }
  }
}

// Calls visit(m, row, half) for each row of the warp that the lane has a part of: values 2 half, 2 half + 1 of its
// products of row tile m are of block row `row`.
template <class Tiling, class Visit>
DIFFKERN_FN void for_each_row(Visit visit) {
  const Warp<Tiling> warp;
#pragma unroll
  for (int m = 0; m < Tiling::row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) visit(m, warp.row + m * 16 + half * 8 + warp.g, half);
}

// Rounds the warp's share of 64 columns and puts it into a chunk, from where it can be read in other shapes.
template <class T, class Tiling>
DIFFKERN_FN void put(uint32_t chunk, const Scores<Tiling>& s) {
  const Warp<Tiling> warp;
  for_each_row<Tiling>([&](int m, int row, int half) {
#pragma unroll
    for (int n = 0; n < kShare<Tiling> / 8; ++n) {
      const int column = warp.column_warp * kShare<Tiling> + n * 8 + warp.q * 2;
      const uint32_t to = at<T>(chunk, row, column / kVector<T>) + column % kVector<T> * sizeof(T);
      store_two<T>(to, s[m][n][2 * half], s[m][n][2 * half + 1]);
    }
  });
}

// The scores of a warp's rows as an operand. Where several warps share them they meet in `exchange`, at a barrier.
template <class T, class Tiling>
DIFFKERN_FN void as_operand(Operand<T, Tiling>& to, const Scores<Tiling>& s, uint32_t exchange) {
  const Warp<Tiling> warp;
  if constexpr (Tiling::column_warps > 1) {
    put<T, Tiling>(exchange, s);
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < Tiling::row_tiles; ++m)
#pragma unroll
    for (int k = 0; k < 64 / kDepth<T>; ++k)
      if constexpr (Tiling::column_warps > 1 && sizeof(T) == 2) {
        load_matrices(to[m][k], at<T>(exchange, warp.row + m * 16 + warp.lane % 16, 2 * k + warp.lane / 16));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if constexpr (sizeof(T) == 2)
            to[m][k][i] = pack<T>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
          else if constexpr (Tiling::column_warps == 1)
            to[m][k][i] = __float_as_uint(s[m][k][i % 2 * 2 + i / 2]);
          else if (i < 2)
            load_two_words(to[m][k][i], to[m][k][i + 2],
                           at<T>(exchange, warp.row + m * 16 + i * 8 + warp.g, 2 * k + warp.q / 2) + warp.q % 2 * 8);
      }
}

// Writes a block's rows, which it has put into its chunks `owned`, 16 bytes a thread.
template <class Tiling, class T>
DIFFKERN_FN void write_rows(const Rows<T>& rows, uint32_t owned, int first, int channels) {
  __syncthreads();
  for (int channel = 0; channel < channels; channel += kChannels) {
    const int piece = threadIdx.x % kPieces<T>, offset = channel + piece * kVector<T>;
    if (offset >= channels) return;
#pragma unroll
    for (int i = 0; i < Tiling::rows * kPieces<T> / Tiling::threads; ++i) {
      const int row = threadIdx.x / kPieces<T> + i * (Tiling::threads / kPieces<T>);
      if (first + row >= rows.count) break;
      write_16_bytes(rows.data + (first + row) * rows.stride + offset,
                     at<T>(owned_chunk<Tiling>(owned, channel), row, piece));
    }
  }
}

// By a power of two. Only differences of scores come here: what large ones would lose as powers of two, they lose not.
DIFFKERN_FN float exp_approx(float x) {
  constexpr float kLog2e = 1.44269504f;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2e));
  return y;
}

DIFFKERN_FN float infinity() { return __int_as_float(0x7F800000); }

// Whether all rows are of aligned 16-byte pieces, as the copies are.
inline bool in_pieces(const AttentionParams& p, std::initializer_list<HeadsView> views) {
  bool holds = whole_pieces(p.dtype, p.channels);
  const int64_t piece = p.dtype == DType::f32 ? 4 : 8;
  for (const HeadsView& x : views)
    holds = holds && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.sample_stride % piece == 0 &&
            x.head_stride % piece == 0 && x.token_stride % piece == 0;
  return holds;
}

// The tensor cores that this kernel can use on the current device. The architecture that it was compiled for decides,
// which may be older than the device. A kernel that cannot be asked cannot be launched either, with any tensor cores.
inline TensorCores tensor_cores_for(DType dtype, bool pieces, void (*kernel)(AttentionParams)) {
  cudaFuncAttributes attributes{};
  report(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return tensor_cores_for(dtype, pieces, attributes.ptxVersion / 10);
}

inline const char* launch_planned(void (*kernel)(AttentionParams), const AttentionPlan& plan, const AttentionParams& p,
                                  Stream stream) {
  if (plan.blocks > INT32_MAX || plan.slices > 65535) return "more blocks than one launch can have";
  const dim3 grid(uint32_t(plan.blocks), uint32_t(plan.slices));
  return launch_kernel(kernel, grid, plan.threads, plan.shared_bytes, stream, p);
}

}  // namespace diffkern::cuda
