// z = the noise of (seed, step, stream). A thread makes 16 bytes at a time: one Philox block, or two.

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

template <class T>
__global__ void noise_kernel(const __grid_constant__ NoiseParams p, const __grid_constant__ Access<T> z) {
  for_each_vector<kVector<T>>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    float value[kVector<T>];
    normals(uint64_t(p.seeds[n]), p.step[n * p.step_stride], p.stream, first, value);
    store(z, n, first, p.elements, value);
  });
}

}  // namespace

const char* noise(const NoiseParams& p, Stream stream) {
  return with_type(p.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = plan_vectors<T>(p.samples, p.elements);
    return launch_kernel(noise_kernel<T>, plan, stream, p, Access<T>(p.z, p.elements));
  });
}

}  // namespace diffkern::cuda
