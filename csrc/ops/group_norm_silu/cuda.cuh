// How group_norm_silu and its gradient walk over images, and their sums and coefficients of channels.
//
// A block has a chunk of the pixels of a set of whole groups (plan.h). Threads walk columns, an access being 16 bytes:
// neighbouring channels, down the pixels (channels_last), or neighbouring pixels along a channel, which then is one
// warp's. Sums go up fixed trees: the same bits every time.

#pragma once

#include "cuda/elements.cuh"
#include "math/group_norm.h"
#include "params.h"
#include "plan.h"

namespace diffkern::cuda {

namespace {

constexpr int kThreads = GroupNormPlan::kThreads, kWarps = kThreads / 32, kMaxGroups = GroupNormPlan::kMaxGroups;

enum class Phase { whole, sums, rest };

// --- a block's part of the tensor -----------------------------------------------------------------------------------

struct Tile {
  int64_t sample, first_pixel;
  int chunk, pixels;
  int first_group, groups, width;  // width: channels a group
  int first_channel, channels;
};

DIFFKERN_FN Tile tile_of(const GroupNormSiluParams& p, const GroupNormPlan& plan, int64_t sample) {
  Tile tile;
  tile.sample = sample;
  tile.chunk = int(blockIdx.x % plan.chunks);
  tile.first_pixel = int64_t(tile.chunk) * plan.chunk_pixels;
  tile.pixels = int(::min(int64_t(plan.chunk_pixels), p.pixels - tile.first_pixel));
  tile.first_group = int(blockIdx.x / plan.chunks) * plan.set_groups;
  tile.groups = ::min(plan.set_groups, int(p.groups) - tile.first_group);
  tile.width = int(p.channels / p.groups);
  tile.first_channel = tile.first_group * tile.width;
  tile.channels = tile.groups * tile.width;
  return tile;
}

// n elements an access, of n channels (last) or of n pixels of a channel.
template <class T_, int n_, bool last_>
struct Layout {
  using T = T_;
  static constexpr int n = n_;
  static constexpr bool last = last_;
  static constexpr int lanes = last ? n : 1;  // channels an access

  struct alignas(n * sizeof(T)) Vector {
    T value[n];
  };

  // The offset of an element in the tensor; channel and pixel count from the tile's first.
  DIFFKERN_FN int64_t at(const GroupNormSiluParams& p, const Tile& tile, int channel, int pixel) {
    const int64_t c = tile.first_channel + channel, i = tile.first_pixel + pixel;
    return tile.sample * p.channels * p.pixels + (last ? i * p.channels + c : c * p.pixels + i);
  }

  DIFFKERN_FN void load(const void* base, int64_t offset, float (&to)[n]) {
    const Vector vector = *reinterpret_cast<const Vector*>(static_cast<const T*>(base) + offset);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = to_f32(vector.value[i]);
  }

  DIFFKERN_FN void store(void* base, int64_t offset, const float (&from)[n]) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < n; ++i) vector.value[i] = from_f32<T>(from[i]);
    *reinterpret_cast<Vector*>(static_cast<T*>(base) + offset) = vector;
  }
};

// A thread's accesses at (channel, first), (channel, first + step), ... of a tile.
struct Column {
  int channel, first, step;
  int across;  // channels_last: columns that lie side by side, one to a thread
};

// Every thread of the block calls visit equally often; one without a column gets first = the end of the tile.
template <int n, bool last, class Visit>
DIFFKERN_FN void for_each_column(const Tile& tile, Visit visit) {
  const int thread = int(threadIdx.x);
  if (last) {
    const int columns = tile.channels / n;
    for (int panel = 0; panel < columns; panel += kThreads) {
      const int across = ::min(columns - panel, kThreads), down = kThreads / across, row = thread / across;
      visit(Column{(panel + thread % across) * n, row < down ? row : tile.pixels, down, across});
    }
  } else {
    for (int channel = thread / 32; channel < tile.channels; channel += kWarps)
      visit(Column{channel, thread % 32 * n, 32 * n, 0});
  }
}

struct Shared {
  float* staging;      // [2][kThreads][lanes]: for channel_sums
  void* slab;          // the tile, pixel by pixel (last) or channel by channel
  float* sums;         // [2][channels]
  float* coefficient;  // [3][channels]
};

DIFFKERN_FN Shared shared_of(const GroupNormPlan& plan) {
  extern __shared__ __align__(16) float shared[];
  float* slab = shared + GroupNormPlan::kStagingFloats;
  float* sums = slab + plan.slab_bytes / 4;
  return {shared, slab, sums, sums + 2 * plan.set_channels};
}

// --- sums -----------------------------------------------------------------------------------------------------------

template <class F>
DIFFKERN_FN F warp_sum(F a) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) a += __shfl_xor_sync(0xFFFFFFFFu, a, offset);
  return a;
}

// k numbers of each of an access's channels.
template <int k, int lanes>
struct Coefficients {
  float of[k][lanes];
};

// shared.sums[j][channel] = the sum over the tile's pixels of what add(own, channel, pixel, a, b) adds to a (j = 0), b
// (1). `own` is prepare(channel): what a column needs at all of its pixels.
template <class T, int n, bool last, class Prepare, class Add>
DIFFKERN_FN void channel_sums(const Tile& tile, const Shared& shared, Prepare prepare, Add add) {
  constexpr int lanes = Layout<T, n, last>::lanes;
  for_each_column<n, last>(tile, [&](const Column& column) {
    float sum[2][lanes] = {};
    if (column.first < tile.pixels) {
      const auto own = prepare(column.channel);
      for (int pixel = column.first; pixel < tile.pixels; pixel += column.step)
        add(own, column.channel, pixel, sum[0], sum[1]);
    }
    if (last) {  // a tree over the threads of a column
      float* own = shared.staging + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 2 * lanes; ++i) own[i * kThreads] = sum[i / lanes][i % lanes];
      const int row = int(threadIdx.x) / column.across;
      for (int rows = column.step; rows > 1;) {
        __syncthreads();
        const int half = (rows + 1) / 2;
        if (row + half < rows)
#pragma unroll
          for (int i = 0; i < 2 * lanes; ++i) own[i * kThreads] += own[i * kThreads + half * column.across];
        rows = half;
      }
      if (row == 0)
#pragma unroll
        for (int i = 0; i < 2 * lanes; ++i)
          shared.sums[i / lanes * tile.channels + column.channel + i % lanes] = own[i * kThreads];
      __syncthreads();
    } else {
      const float a = warp_sum(sum[0][0]), b = warp_sum(sum[1][0]);
      if (threadIdx.x % 32 == 0) {
        shared.sums[column.channel] = a;
        shared.sums[tile.channels + column.channel] = b;
      }
    }
  });
  __syncthreads();
}

// Calls done(group, a, b) in every lane of a group's warp: sums over the group's channels of what of(channel) gives.
template <class Of, class Done>
DIFFKERN_FN void group_sums(const Tile& tile, Of of, Done done) {
  for (int group = int(threadIdx.x) / 32; group < tile.groups; group += kWarps) {
    float2 sum{};
    for (int c = int(threadIdx.x) % 32; c < tile.width; c += 32) {
      const float2 one = of(group * tile.width + c, group);
      sum.x += one.x;
      sum.y += one.y;
    }
    done(group, warp_sum(sum.x), warp_sum(sum.y));
  }
  __syncthreads();
}

DIFFKERN_FN float added(const GroupNormSiluParams& p, const Tile& tile, int channel) {
  return p.add ? p.add[tile.sample * p.channels + tile.first_channel + channel] : 0.0f;
}

// --- coefficients ---------------------------------------------------------------------------------------------------

DIFFKERN_FN Affine affine_of(const GroupNormSiluParams& p, const Tile& tile, int channel, double mean, float rstd) {
  const int64_t c = tile.first_channel + channel;
  float weight = p.weight[c], bias = p.bias[c];
  if (p.scale_shift) {
    const float* scale = p.scale_shift + tile.sample * 2 * p.channels + c;
    modulate(weight, bias, scale[0], scale[p.channels]);
  }
  return affine(weight, bias, mean, added(p, tile, channel), rstd);
}

// center, slope and offset of an access's channels, from shared memory.
template <int lanes>
DIFFKERN_FN Coefficients<3, lanes> coefficients_of(const Shared& shared, const Tile& tile, int channel) {
  Coefficients<3, lanes> to;
#pragma unroll
  for (int j = 0; j < 3; ++j)
#pragma unroll
    for (int l = 0; l < lanes; ++l) to.of[j][l] = shared.coefficient[j * tile.channels + channel + l];
  return to;
}

// --- launching ------------------------------------------------------------------------------------------------------

using Kernel = void (*)(GroupNormSiluParams, GroupNormPlan, Phase);

// kernel_of(layout): the kernel for that Layout.
template <class T, int n, class KernelOf>
Kernel choose(bool channels_last, KernelOf kernel_of) {
  return channels_last ? kernel_of(Layout<T, n, true>{}) : kernel_of(Layout<T, n, false>{});
}

template <class T, class KernelOf>
Kernel choose(const GroupNormPlan& plan, bool channels_last, KernelOf kernel_of) {
  return plan.vector == 1 ? choose<T, 1>(channels_last, kernel_of) : choose<T, kVector<T>>(channels_last, kernel_of);
}

template <class KernelOf>
Kernel choose(const GroupNormPlan& plan, DType dtype, bool channels_last, KernelOf kernel_of) {
  switch (dtype) {
    case DType::f32: return choose<float>(plan, channels_last, kernel_of);
    case DType::bf16: return choose<__nv_bfloat16>(plan, channels_last, kernel_of);
    default: return choose<__half>(plan, channels_last, kernel_of);
  }
}

template <class KernelOf>
const char* launch(const GroupNormSiluParams& p, Stream stream, KernelOf kernel_of) {
  if (p.channels / p.groups > GroupNormPlan::kMaxWidth) return "groups: expected at most 512 channels a group";
  const GroupNormPlan plan = plan_group_norm(p);
  const Kernel kernel = choose(plan, p.dtype, p.channels_last, kernel_of);
  const dim3 grid(plan.grid_x(), plan.grid_y(p.samples));
  const auto enqueue = [&](Phase phase) {
    return launch_kernel(kernel, grid, kThreads, plan.shared_bytes, stream, p, plan, phase);
  };
  if (plan.chunks == 1) return enqueue(Phase::whole);
  const char* error = enqueue(Phase::sums);
  return error != nullptr ? error : enqueue(Phase::rest);
}

}  // namespace

}  // namespace diffkern::cuda
