// loss_n = weight_n mean (out - eps)^2 (Ho et al. 2020, eq. 14) with eps made again instead of stored.
// Forward: a block sums a chunk in a fixed order, then a thread sums the chunks of a sample; no atomics.

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

constexpr int kThreads = plan_noise_loss(1, 1).threads;

template <class T>
DIFFKERN_FN void errors(const NoiseLossParams& p, const Access<T>& out, int64_t n, int64_t first,
                        float (&error)[kVector<T>]) {
  float z[kVector<T>];
  load(out, n, first, p.elements, error);
  normals(uint64_t(p.seeds[n]), p.t[n * p.t_stride], kForwardNoising, first, z);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) error[i] = first + i < p.elements ? __fsub_rn(error[i], z[i]) : 0.0f;
}

template <class T>
__global__ void partial_kernel(const __grid_constant__ NoiseLossParams p, const __grid_constant__ Access<T> out) {
  __shared__ float warp_sums[kThreads / 32];
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y)
    for (int64_t chunk = blockIdx.x; chunk < per_sample; chunk += gridDim.x) {
      const int64_t chunk_end = (chunk + 1) * kChunk, end = chunk_end < p.elements ? chunk_end : p.elements;
      float sum = 0;
      for (int64_t first = chunk * kChunk + threadIdx.x * kVector<T>; first < end; first += kThreads * kVector<T>) {
        float error[kVector<T>];
        errors(p, out, n, first, error);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) sum += error[i] * error[i];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
      if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
      __syncthreads();
      if (threadIdx.x == 0) {
        double total = 0;
        for (int w = 0; w < kThreads / 32; ++w) total += warp_sums[w];
        p.partial[n * per_sample + chunk] = total;
      }
      __syncthreads();
    }
}

__global__ void total_kernel(const __grid_constant__ NoiseLossParams p) {
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < p.samples; n += int64_t(gridDim.x) * blockDim.x) {
    double sum = 0;
    for (int64_t c = 0; c < per_sample; ++c) sum += p.partial[n * per_sample + c];
    p.loss[n] = float(sum / double(p.elements) * (p.weights ? p.weights[n] : 1.0f));
  }
}

template <class T>
__global__ void backward_kernel(const __grid_constant__ NoiseLossParams p, const __grid_constant__ Access<T> out, const __grid_constant__ Access<T> grad_out) {
  for_each_vector<kVector<T>>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    const float slope = float(2.0 / double(p.elements) * (p.weights ? p.weights[n] : 1.0f) * p.grad_loss[n]);
    float error[kVector<T>];
    errors(p, out, n, first, error);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) error[i] = __fmul_rn(slope, error[i]);
    store(grad_out, n, first, p.elements, error);
  });
}

}  // namespace

const char* noise_loss(const NoiseLossParams& p, Stream stream) {
  const char* error = with_type(p.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = plan_noise_loss(p.samples, p.elements);
    return launch_kernel(partial_kernel<T>, plan, stream, p, Access<T>(p.out, p.elements));
  });
  if (error != nullptr) return error;
  return launch_kernel(total_kernel, plan_elementwise(1, p.samples), stream, p);
}

const char* noise_loss_backward(const NoiseLossParams& p, Stream stream) {
  return with_type(p.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = plan_vectors<T>(p.samples, p.elements);
    return launch_kernel(backward_kernel<T>, plan, stream, p, Access<T>(p.out, p.elements),
                         Access<T>(p.grad_out, p.elements));
  });
}

}  // namespace diffkern::cuda
