// One step of a sampler (math/update.h) with its noise. A thread does 16 bytes at a time: x and the network's output are
// read once and x_next is written once. The row is chosen by an index in device memory, so that no launch waits for the
// host and a CUDA graph can replay it.

#include "math/update.h"

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

template <class T>
struct Accesses {
  Access<T> x, out, out_uncond, x_next, x0_hat, history[kMaxHistory];
};

template <class T, bool kGuided, bool kLearned>
__global__ void reverse_step_kernel(const __grid_constant__ ReverseStepParams p, const __grid_constant__ Accesses<T> at) {
  constexpr int n_vector = kVector<T>;
  const float limit = p.clip ? 1.0f : __int_as_float(0x7F800000);
  for_each_vector<n_vector>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    const int64_t step = p.step[n * p.step_stride];
    if (step < 0 || step >= p.rows) {
      float value[n_vector];
#pragma unroll
      for (int i = 0; i < n_vector; ++i) value[i] = nan();
      store(at.x_next, n, first, p.elements, value);
      if (at.x0_hat.view.data) store(at.x0_hat, n, first, p.elements, value);
      return;
    }
    const float* columns = p.table + step * p.columns;
    const Row row = {columns[0], columns[1], columns[2], columns[3], columns[4],
                     columns[5], columns[6], columns[7], columns[8]};

    float x[n_vector], o[n_vector], next[n_vector];
    load(at.x, n, first, p.elements, x);
    load(at.out, n, first, p.elements, o);
    if (kGuided) {
      float uncond[n_vector];
      load(at.out_uncond, n, first, p.elements, uncond);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) o[i] = guided<Rounded>(p.guidance, o[i], uncond[i]).value;
    }
    float x0[n_vector];
#pragma unroll
    for (int i = 0; i < n_vector; ++i) {
      x0[i] = predicted_x0<Rounded>(row, x[i], o[i], limit).value;
      next[i] = next_mean<Rounded>(row, x[i], o[i], x0[i]).value;
    }
#pragma unroll
    for (int h = 0; h < kMaxHistory; ++h)
      if (h < p.history_count) {
        float earlier[n_vector];
        load(at.history[h], n, first, p.elements, earlier);
        const Rounded k = columns[kRowColumns + h];
#pragma unroll
        for (int i = 0; i < n_vector; ++i) next[i] = (next[i] + k * earlier[i]).value;
      }
    if (row.sigma != 0) {
      float sigma[n_vector], z[n_vector];
      if (kLearned) load(at.out, n, p.elements + first, 2 * p.elements, sigma);
      normals(uint64_t(p.seeds[n]), uint32_t(row.t), kReverseStep, first, z);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) {
        const Rounded s = kLearned ? learned_sigma<Rounded>(row, sigma[i]) : Rounded(row.sigma);
        next[i] = (next[i] + s * z[i]).value;
      }
    }
    store(at.x_next, n, first, p.elements, next);
    if (at.x0_hat.view.data) store(at.x0_hat, n, first, p.elements, x0);  // last: it may lie where an input did
  });
}

template <class T, bool kGuided, bool kLearned>
const char* launch(const ReverseStepParams& p, Stream stream) {
  Accesses<T> at;
  at.x = Access<T>(p.x, p.elements);
  at.out = Access<T>(p.out, p.elements);
  at.out_uncond = Access<T>(p.out_uncond, p.elements);
  at.x_next = Access<T>(p.x_next, p.elements);
  at.x0_hat = Access<T>(p.x0_hat, p.elements);
  for (int h = 0; h < p.history_count; ++h) at.history[h] = Access<T>(p.history[h], p.elements);
  const Plan plan = plan_vectors<T>(p.samples, p.elements);
  return launch_kernel(reverse_step_kernel<T, kGuided, kLearned>, plan, stream, p, at);
}

}  // namespace

const char* reverse_step(const ReverseStepParams& p, Stream stream) {
  return with_type(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool is_guided = p.out_uncond.data != nullptr;
    if (is_guided && p.learned_variance) return launch<T, true, true>(p, stream);
    if (is_guided) return launch<T, true, false>(p, stream);
    if (p.learned_variance) return launch<T, false, true>(p, stream);
    return launch<T, false, false>(p, stream);
  });
}

}  // namespace diffkern::cuda
