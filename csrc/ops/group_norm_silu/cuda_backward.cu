// The gradient of group_norm_silu. If an image is one chunk (cuda.cuh), one launch does it all; else a first launch sums
// the chunks, and a second joins the sums.

#include "cuda.cuh"

namespace diffkern::cuda {

namespace {

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
    const float z = normalised(distance, own.of[1][l], own.of[2][l]);
    visit(i, l, distance, p.silu ? grad_y[i] * silu_slope(z) : grad_y[i]);
  }
}

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
      const Affine a = affine_of(p, tile, c, mean[c / tile.width], rstd[c / tile.width]);
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
            grad_x[i] = input_gradient(grad_z, distance, own.of[1][l], by_distance[l], constant[l]);
          });
          L::store(p.grad_x, at, grad_x);
        }
      });
    }
    __syncthreads();
  }
}

}  // namespace

const char* group_norm_silu_backward(const GroupNormSiluParams& p, Stream stream) {
  return launch(p, stream, [](auto layout) -> Kernel {
    using L = decltype(layout);
    return backward_kernel<typename L::T, L::n, L::last>;
  });
}

}  // namespace diffkern::cuda
