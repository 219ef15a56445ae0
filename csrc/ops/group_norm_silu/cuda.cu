// y = silu(norm(x + add) (1 + scale) + shift) + residual, norm over groups of channels (Wu & He 2018).
//
// A block keeps a chunk of the pixels of a set of whole groups in shared memory (cuda.cuh). If an image is one chunk,
// one launch does it all and reads x once; else a first launch sums the chunks, and a second joins the sums.

#include "cuda.cuh"

namespace diffkern::cuda {

namespace {

struct Moments {
  double mean, squares;  // squares: the sum of squared distances from the mean
};

// The moments of the tile's groups: reads x into the slab, and sums its distances from the group's first element; their
// mean is a pivot, from which distances are summed up again. So no sum is large beside its result, however far the mean
// is from 0, and that of equal elements is 0.
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
        z[i] = normalised(z[i] - own.of[0][l], own.of[1][l], own.of[2][l]);
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
        const Affine a = affine_of(p, tile, c, moments[c / tile.width].mean, rstd[c / tile.width]);
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

}  // namespace

const char* group_norm_silu(const GroupNormSiluParams& p, Stream stream) {
  return launch(p, stream, [](auto layout) -> Kernel {
    using L = decltype(layout);
    return forward_kernel<typename L::T, L::n, L::last>;
  });
}

}  // namespace diffkern::cuda
