// Sums of a, b, a^2, a b and b^2 of each sample: a block sums a chunk in a fixed order, then a thread sums the chunks of
// a sample; no atomics.

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

constexpr int kThreads = plan_sums(1, 1).threads, kWarps = kThreads / 32;

template <class T>
__global__ void partial_kernel(const __grid_constant__ MomentsParams p, const __grid_constant__ Access<T> at_a,
                               const __grid_constant__ Access<T> at_b) {
  __shared__ float warp_sums[kWarps][kMoments];
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y)
    for (int64_t chunk = blockIdx.x; chunk < per_sample; chunk += gridDim.x) {
      const int64_t chunk_end = (chunk + 1) * kChunk, end = chunk_end < p.elements ? chunk_end : p.elements;
      float sums[kMoments] = {};
      for (int64_t first = chunk * kChunk + threadIdx.x * kVector<T>; first < end; first += kThreads * kVector<T>) {
        float a[kVector<T>], b[kVector<T>];
        load(at_a, n, first, p.elements, a);
        load(at_b, n, first, p.elements, b);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          if (first + i >= p.elements) a[i] = b[i] = 0;
          sums[0] += a[i], sums[1] += b[i], sums[2] += a[i] * a[i], sums[3] += a[i] * b[i], sums[4] += b[i] * b[i];
        }
      }
#pragma unroll
      for (int m = 0; m < kMoments; ++m) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sums[m] += __shfl_xor_sync(0xFFFFFFFFu, sums[m], offset);
        if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][m] = sums[m];
      }
      __syncthreads();
      if (threadIdx.x < kMoments) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += warp_sums[w][threadIdx.x];
        p.partial[(n * per_sample + chunk) * kMoments + threadIdx.x] = total;
      }
      __syncthreads();
    }
}

__global__ void total_kernel(const __grid_constant__ MomentsParams p) {
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk, total = p.samples * kMoments;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t n = i / kMoments, m = i % kMoments;
    double sum = 0;
    for (int64_t c = 0; c < per_sample; ++c) sum += p.partial[(n * per_sample + c) * kMoments + m];
    p.moments[i] = sum;
  }
}

}  // namespace

const char* moments(const MomentsParams& p, Stream stream) {
  const char* error = with_type(p.a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = plan_sums(p.samples, p.elements);
    return launch_kernel(partial_kernel<T>, plan, stream, p, Access<T>(p.a, p.elements), Access<T>(p.b, p.elements));
  });
  if (error != nullptr) return error;
  return launch_kernel(total_kernel, plan_elementwise(1, p.samples * kMoments), stream, p);
}

}  // namespace diffkern::cuda
