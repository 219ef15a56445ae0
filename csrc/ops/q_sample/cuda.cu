// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4). A thread does 16 bytes at a time.

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

template <class T>
__global__ void q_sample_kernel(const __grid_constant__ QSampleParams p, const __grid_constant__ Access<T> x_0, const __grid_constant__ Access<T> x_t, const __grid_constant__ Access<T> eps) {
  constexpr int n_vector = kVector<T>;
  for_each_vector<n_vector>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    const int64_t t = p.t[n * p.t_stride];
    const bool inside = t >= 0 && t < p.rows;
    const Rounded a = inside ? p.table[2 * t] : nan(), s = inside ? p.table[2 * t + 1] : nan();

    float x[n_vector], z[n_vector];
    load(x_0, n, first, p.elements, x);
    normals(uint64_t(p.seeds[n]), p.address ? p.address[n * p.address_stride] : t, kForwardNoising, first, z);
    if (eps.view.data) store(eps, n, first, p.elements, z);
#pragma unroll
    for (int i = 0; i < n_vector; ++i) x[i] = (a * x[i] + s * z[i]).value;
    store(x_t, n, first, p.elements, x);
  });
}

}  // namespace

const char* q_sample(const QSampleParams& p, Stream stream) {
  return with_type(p.x_0.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = plan_vectors<T>(p.samples, p.elements);
    return launch_kernel(q_sample_kernel<T>, plan, stream, p, Access<T>(p.x_0, p.elements),
                         Access<T>(p.x_t, p.elements), Access<T>(p.eps, p.elements));
  });
}

}  // namespace diffkern::cuda
