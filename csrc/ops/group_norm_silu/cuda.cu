// y = silu(norm(x + add) (1 + scale) + shift) + residual, norm over groups of channels (Wu & He 2018); its gradient.
//
// A block has a chunk of the pixels of a set of whole groups (plan.h), forward in shared memory. Where an image is one
// chunk, one launch does it all and reads x once; else a first launch sums the chunks, and a second joins the sums.
// Threads walk columns, an access being 16 bytes: neighbouring channels, down the pixels (channels_last), or
// neighbouring pixels along a channel, which then is one warp's. Sums go up fixed trees: the same bits every time.

#include "cuda/elements.cuh"
#include "math/silu.h"
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
template <class T, int n, bool last>
struct Layout {
  static constexpr int lanes = last ? n : 1;  // channels an access

  struct alignas(n * sizeof(T)) Vector {
    T value[n];
  };

  // Of an element in the tensor; channel and pixel count from the tile's first.
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

struct Affine {
  float center, slope, offset;  // (x - center) slope + offset is z, the argument of silu
};

DIFFKERN_FN Affine affine(const GroupNormSiluParams& p, const Tile& tile, int channel, double mean, float rstd) {
  const int64_t c = tile.first_channel + channel;
  float weight = p.weight[c], bias = p.bias[c];
  if (p.scale_shift) {
    const float* scale = p.scale_shift + tile.sample * 2 * p.channels + c;
    weight *= 1.0f + scale[0];
    bias = bias * (1.0f + scale[0]) + scale[p.channels];
  }
  const double center = mean - double(added(p, tile, channel));
  const float slope = rstd * weight;
  return {float(center), slope, bias + float(double(float(center)) - center) * slope};
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

// --- forward --------------------------------------------------------------------------------------------------------

struct Moments {
  double mean, squares;  // squares: the sum of squared distances from the mean
};

// Of the tile's groups: reads x into the slab, and sums its distances from the group's first element; their mean is a
// pivot, from which distances are summed up again. So no sum is large beside what it is for, however far the mean is
// from 0, and that of equal elements is 0.
template <class T, int n, bool last>
DIFFKERN_FN void moments_of(const GroupNormSiluParams& p, const GroupNormPlan& plan, const Tile& tile,
                            const Shared& shared, Moments* moments) {
  using L = Layout<T, n, last>;
  __shared__ float origin[kMaxGroups], pivot[kMaxGroups];  // pivot: from the origin on
  const int row = last ? tile.channels : plan.chunk_pixels;
  auto in_slab = [&](int channel, int pixel) { return last ? pixel * row + channel : channel * row + pixel; };
  for (int group = int(threadIdx.x); group < tile.groups; group += kThreads) {
    const int64_t at = Layout<T, 1, last>::at(p, tile, group * tile.width, 0);
    origin[group] = to_f32(static_cast<const T*>(p.x)[at]);
  }
  __syncthreads();
  using Sum = float[L::lanes];
  channel_sums<T, n, last>(
      tile, shared,
      [&](int channel) {
        Coefficients<1, L::lanes> own;
#pragma unroll
        for (int l = 0; l < L::lanes; ++l) own.of[0][l] = origin[(channel + l) / tile.width];
        return own;
      },
      [&](const auto& own, int channel, int pixel, Sum& a, Sum&) {
        float x[n];
        L::load(p.x, L::at(p, tile, channel, pixel), x);
        L::store(shared.slab, in_slab(channel, pixel), x);
#pragma unroll
        for (int i = 0; i < n; ++i) a[last ? i : 0] += x[i] - own.of[0][last ? i : 0];
      });
  const float pixels = float(tile.pixels), per_element = __fdividef(1.0f, float(tile.width) * pixels);
  group_sums(
      tile, [&](int c, int) { return float2{shared.sums[c] + pixels * added(p, tile, c), 0.0f}; },
      [&](int group, float sum, float) { pivot[group] = sum * per_element; });
  channel_sums<T, n, last>(
      tile, shared,
      [&](int channel) {
        Coefficients<2, L::lanes> own;
#pragma unroll
        for (int l = 0; l < L::lanes; ++l) {
          const int group = (channel + l) / tile.width;
          own.of[0][l] = origin[group];
          own.of[1][l] = added(p, tile, channel + l) - pivot[group];
        }
        return own;
      },
      [&](const auto& own, int channel, int pixel, Sum& a, Sum& b) {
        float x[n];
        L::load(shared.slab, in_slab(channel, pixel), x);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const int l = last ? i : 0;
          const float distance = x[i] - own.of[0][l] + own.of[1][l];
          a[l] += distance;
          b[l] += distance * distance;
        }
      });
  group_sums(
      tile, [&](int c, int) { return float2{shared.sums[c], shared.sums[tile.channels + c]}; },
      [&](int group, float distance, float square) {
        const float apart = distance * per_element, squares = square - apart * distance;
        if (threadIdx.x % 32 == 0)
          moments[group] = {double(origin[group]) + double(pivot[group]) + apart, squares < 0 ? 0 : squares};
      });
}

// Joins the chunks' moments.
DIFFKERN_FN void join_chunks(const GroupNormSiluParams& p, const GroupNormPlan& plan, const Tile& tile,
                             Moments* moments) {
  const int lane = int(threadIdx.x) % 32;
  for (int group = int(threadIdx.x) / 32; group < tile.groups; group += kWarps) {
    const double* partial =
        p.partial_moments + (tile.sample * p.groups + tile.first_group + group) * plan.chunks * 2;
    auto pixels = [&](int chunk) {
      return double(::min(int64_t(plan.chunk_pixels), p.pixels - int64_t(chunk) * plan.chunk_pixels));
    };
    double mean = 0, squares = 0;
    for (int chunk = lane; chunk < plan.chunks; chunk += 32) mean += pixels(chunk) * (partial[2 * chunk] - partial[0]);
    mean = partial[0] + warp_sum(mean) * plan.per_pixel;
    for (int chunk = lane; chunk < plan.chunks; chunk += 32) {
      const double apart = partial[2 * chunk] - mean;
      squares += partial[2 * chunk + 1] + pixels(chunk) * tile.width * apart * apart;
    }
    squares = warp_sum(squares);
    if (lane == 0) moments[group] = {mean, squares};
  }
  __syncthreads();
}

template <class T, int n, bool last>
DIFFKERN_FN void normalise(const GroupNormSiluParams& p, const GroupNormPlan& plan, const Tile& tile,
                           const Shared& shared, bool in_slab) {
  using L = Layout<T, n, last>;
  const int row = last ? tile.channels : plan.chunk_pixels;
  for_each_column<n, last>(tile, [&](const Column& column) {
    const auto own = coefficients_of<L::lanes>(shared, tile, column.channel);
    for (int pixel = column.first; pixel < tile.pixels; pixel += column.step) {
      const int64_t at = L::at(p, tile, column.channel, pixel);
      float z[n], residual[n];
      if (in_slab)
        L::load(shared.slab, last ? pixel * row + column.channel : column.channel * row + pixel, z);
      else
        L::load(p.x, at, z);
      if (p.residual) L::load(p.residual, at, residual);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int l = last ? i : 0;
        z[i] = multiply_add(z[i] - own.of[0][l], own.of[1][l], own.of[2][l]);
        if (p.silu) z[i] = silu(z[i]);
        if (p.residual) z[i] += residual[i];
      }
      L::store(p.y, at, z);
    }
  });
}

template <class T, int n, bool last>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ GroupNormSiluParams p,
                                                           const __grid_constant__ GroupNormPlan plan, Phase phase) {
  __shared__ Moments moments[kMaxGroups];
  __shared__ float rstd[kMaxGroups];
  const Shared shared = shared_of(plan);
  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const Tile tile = tile_of(p, plan, sample);
    if (phase == Phase::rest)
      join_chunks(p, plan, tile, moments);
    else
      moments_of<T, n, last>(p, plan, tile, shared, moments);

    const int g = int(threadIdx.x);
    const int64_t group = sample * p.groups + tile.first_group + g;
    if (phase == Phase::sums) {
      if (g < tile.groups) {
        double* partial = p.partial_moments + (group * plan.chunks + tile.chunk) * 2;
        partial[0] = moments[g].mean;
        partial[1] = moments[g].squares;
      }
    } else {
      if (g < tile.groups) {
        rstd[g] = rsqrtf(float(moments[g].squares * plan.per_element) + p.eps);
        if (tile.chunk == 0) {
          p.mean[group] = float(moments[g].mean);
          p.rstd[group] = rstd[g];
        }
      }
      __syncthreads();
      for (int c = int(threadIdx.x); c < tile.channels; c += kThreads) {
        const Affine a = affine(p, tile, c, moments[c / tile.width].mean, rstd[c / tile.width]);
        shared.coefficient[c] = a.center;
        shared.coefficient[tile.channels + c] = a.slope;
        shared.coefficient[2 * tile.channels + c] = a.offset;
      }
      __syncthreads();
      normalise<T, n, last>(p, plan, tile, shared, phase == Phase::whole);
    }
    __syncthreads();
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// Calls visit(i, lane, x - center, grad_z) for each element of an access.
template <class T, int n, bool last, class Visit>
DIFFKERN_FN void for_each_gradient(const GroupNormSiluParams& p, int64_t at,
                                   const Coefficients<3, Layout<T, n, last>::lanes>& own, Visit visit) {
  using L = Layout<T, n, last>;
  float x[n], grad_y[n];
  L::load(p.x, at, x);
  L::load(p.grad_y, at, grad_y);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const int l = last ? i : 0;
    const float distance = x[i] - own.of[0][l];
    const float z = multiply_add(distance, own.of[1][l], own.of[2][l]);
    visit(i, l, distance, p.silu ? grad_y[i] * silu_slope(z) : grad_y[i]);
  }
}

// With xhat = (x + add - mean) rstd and m(.) the mean over the group's elements:
// grad_x = rstd (w grad_z - m(w grad_z) - xhat m(w grad_z xhat)), w rstd being the slope.
template <class T, int n, bool last>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ GroupNormSiluParams p,
                                                            const __grid_constant__ GroupNormPlan plan, Phase phase) {
  using L = Layout<T, n, last>;
  __shared__ float of_one[kMaxGroups], of_xhat[kMaxGroups];  // rstd m(w grad_z), rstd m(w grad_z xhat)
  const Shared shared = shared_of(plan);
  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const Tile tile = tile_of(p, plan, sample);
    const int channels = tile.channels;
    const float* mean = p.mean + sample * p.groups + tile.first_group;
    const float* rstd = p.rstd + sample * p.groups + tile.first_group;
    for (int c = int(threadIdx.x); c < channels; c += kThreads) {
      const Affine a = affine(p, tile, c, mean[c / tile.width], rstd[c / tile.width]);
      shared.coefficient[c] = a.center;
      shared.coefficient[channels + c] = a.slope;
      shared.coefficient[2 * channels + c] = a.offset;
    }
    __syncthreads();

    if (phase != Phase::rest)
      channel_sums<T, n, last>(
          tile, shared, [&](int channel) { return coefficients_of<L::lanes>(shared, tile, channel); },
          [&](const auto& own, int channel, int pixel, float(&a)[L::lanes], float(&b)[L::lanes]) {
            for_each_gradient<T, n, last>(p, L::at(p, tile, channel, pixel), own,
                                          [&](int, int l, float distance, float grad_z) {
                                            a[l] += grad_z;
                                            b[l] += grad_z * distance;
                                          });
          });
    float* partial = p.partial_sums + sample * plan.chunks * 2 * p.channels + tile.first_channel;  // of chunk 0
    if (phase == Phase::sums) {
      for (int c = int(threadIdx.x); c < 2 * channels; c += kThreads)
        partial[(2 * tile.chunk + c / channels) * p.channels + c % channels] = shared.sums[c];
    } else {
      for (int c = int(threadIdx.x); c < 2 * channels; c += kThreads) {
        float sum = shared.sums[c];
        if (phase == Phase::rest) {
          sum = 0;
          for (int chunk = 0; chunk < plan.chunks; ++chunk)
            sum += partial[(2 * chunk + c / channels) * p.channels + c % channels];
        }
        if (c >= channels) sum *= rstd[c % channels / tile.width];
        shared.sums[c] = sum;
        if (tile.chunk == 0)
          (c < channels ? p.grad_offset : p.grad_slope)[sample * p.channels + tile.first_channel + c % channels] = sum;
      }
      __syncthreads();
      const float share = float(plan.per_element);
      group_sums(
          tile,
          [&](int c, int) {
            const float slope = shared.coefficient[channels + c] * share;
            return float2{slope * shared.sums[c], slope * shared.sums[channels + c]};
          },
          [&](int group, float one, float xhat) {
            if (threadIdx.x % 32 == 0) {
              of_one[group] = one;
              of_xhat[group] = xhat;
            }
          });
      for_each_column<n, last>(tile, [&](const Column& column) {
        const auto own = coefficients_of<L::lanes>(shared, tile, column.channel);
        float by_distance[L::lanes], constant[L::lanes];
#pragma unroll
        for (int l = 0; l < L::lanes; ++l) {
          const int group = (column.channel + l) / tile.width;
          by_distance[l] = -of_xhat[group] * rstd[group];
          constant[l] = -of_one[group];
        }
        for (int pixel = column.first; pixel < tile.pixels; pixel += column.step) {
          const int64_t at = L::at(p, tile, column.channel, pixel);
          float grad_x[n];
          for_each_gradient<T, n, last>(p, at, own, [&](int i, int l, float distance, float grad_z) {
            grad_x[i] = multiply_add(own.of[1][l], grad_z, multiply_add(by_distance[l], distance, constant[l]));
          });
          L::store(p.grad_x, at, grad_x);
        }
      });
    }
    __syncthreads();
  }
}

// --- launching ------------------------------------------------------------------------------------------------------

using Kernel = void (*)(GroupNormSiluParams, GroupNormPlan, Phase);

struct Kernels {
  Kernel forward, backward;
};

template <class T, int n>
Kernels kernels_of(bool channels_last) {
  if (channels_last) return {forward_kernel<T, n, true>, backward_kernel<T, n, true>};
  return {forward_kernel<T, n, false>, backward_kernel<T, n, false>};
}

template <class T>
Kernels kernels_of(const GroupNormPlan& plan, bool channels_last) {
  return plan.vector == 1 ? kernels_of<T, 1>(channels_last) : kernels_of<T, 16 / sizeof(T)>(channels_last);
}

Kernels kernels_of(const GroupNormPlan& plan, DType dtype, bool channels_last) {
  switch (dtype) {
    case DType::f32: return kernels_of<float>(plan, channels_last);
    case DType::bf16: return kernels_of<__nv_bfloat16>(plan, channels_last);
    default: return kernels_of<__half>(plan, channels_last);
  }
}

const char* launch(Kernel kernel, const GroupNormSiluParams& p, const GroupNormPlan& plan, Stream stream) {
  if (p.channels / p.groups > GroupNormPlan::kMaxWidth) return "groups: expected at most 512 channels a group";
  const dim3 grid(plan.grid_x(), plan.grid_y(p.samples));
  const auto enqueue = [&](Phase phase) {
    return launch_kernel(kernel, grid, kThreads, plan.shared_bytes, stream, p, plan, phase);
  };
  if (plan.chunks == 1) return enqueue(Phase::whole);
  const char* error = enqueue(Phase::sums);
  return error != nullptr ? error : enqueue(Phase::rest);
}

}  // namespace

const char* group_norm_silu(const GroupNormSiluParams& p, Stream stream) {
  const GroupNormPlan plan = plan_group_norm(p);
  return launch(kernels_of(plan, p.dtype, p.channels_last).forward, p, plan, stream);
}

const char* group_norm_silu_backward(const GroupNormSiluParams& p, Stream stream) {
  const GroupNormPlan plan = plan_group_norm(p);
  return launch(kernels_of(plan, p.dtype, p.channels_last).backward, p, plan, stream);
}

}  // namespace diffkern::cuda
