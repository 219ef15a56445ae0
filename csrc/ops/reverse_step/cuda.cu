// One step of a sampler (math/update.h) with its noise. A thread does 16 bytes at a time: what its row uses is read
// once, but for out_uncond and the gradient in the few samplers that use them twice, and x_next is written once. The row
// is chosen by an index in device memory, so that no launch waits for the host and a CUDA graph can replay it.

#include "math/update.h"

#include "cuda/elements.cuh"
#include "row.h"

namespace diffkern::cuda {

namespace {

template <class T>
struct Accesses {
  Access<T> x, out, out_uncond, grad, known, mask, x_next, kept, history[kMaxHistory];
};

template <int n>
struct Noise {
  float z[n];
};

// For the noises that few rows draw: in line, they would take registers from all.
template <int n>
__device__ __noinline__ Noise<n> more_noise(uint64_t seed, uint32_t address, uint32_t stream, int64_t first) {
  Noise<n> noise;
  normals(seed, address, stream, first, noise.z);
  return noise;
}

// z + the row's other noises
template <int n>
DIFFKERN_FN void add_noises(const Row& row, uint64_t seed, int64_t first, float (&z)[n]) {
#pragma unroll 1
  for (uint32_t i = 1; i < row.count; ++i) {
    const Noise<n> term = more_noise<n>(seed, row.address - i, kReverseStep, first);
#pragma unroll
    for (int e = 0; e < n; ++e) z[e] = __fadd_rn(z[e], term.z[e]);
  }
}

// to + k operand
template <class T>
DIFFKERN_FN void add(float k, const Access<T>& operand, int64_t n, int64_t first, int64_t end,
                     float (&to)[kVector<T>]) {
  float value[kVector<T>];
  load(operand, n, first, end, value);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) to[i] = (to[i] + Rounded(k) * value[i]).value;
}

// Blocks that a multiprocessor must have registers for. From sm_100 on, code for three would spill.
#if __CUDA_ARCH__ >= 1000
template <class T, bool kLearned>
constexpr int kBlocks = 2;
#else
template <class T, bool kLearned>
constexpr int kBlocks = sizeof(T) == 4 && !kLearned ? 3 : 2;
#endif

template <class T, bool kGuided, bool kLearned>
__global__ void __launch_bounds__(256, kBlocks<T, kLearned>)
    reverse_step_kernel(const __grid_constant__ ReverseStepParams p, const __grid_constant__ Accesses<T> at) {
  constexpr int n_vector = kVector<T>;
  for_each_vector<n_vector>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    const int64_t step = p.step[n * p.step_stride];
    if (step < 0 || step >= p.rows) {
      float value[n_vector];
#pragma unroll
      for (int i = 0; i < n_vector; ++i) value[i] = nan();
      store(at.x_next, n, first, p.elements, value);
      if (at.kept.view.data) store(at.kept, n, first, p.elements, value);
      return;
    }
    const Row row = read_row(p, step);
    const uint64_t seed = uint64_t(p.seeds[n]);

    float x[n_vector], o[n_vector], x0[n_vector], next[n_vector];
    load(at.x, n, first, p.elements, x);
    load(at.out, n, first, p.elements, o);
    if (kGuided) {
      float uncond[n_vector];
      load(at.out_uncond, n, first, p.elements, uncond);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) o[i] = guided<Rounded>(row.w, o[i], uncond[i]).value;
    }
#pragma unroll
    for (int i = 0; i < n_vector; ++i) x0[i] = predicted_x0<Rounded>(row, x[i], o[i]).value;
    if (!row.plain && row.p_g != 0) add(row.p_g, at.grad, n, first, p.elements, x0);
#pragma unroll
    for (int i = 0; i < n_vector; ++i) {
      x0[i] = clamped<Rounded>(x0[i], row.limit).value;
      next[i] = next_mean<Rounded>(row, x[i], o[i], x0[i]).value;
    }
    if (!row.plain && at.kept.view.data) {  // stored last: it may lie where an input does
#pragma unroll
      for (int i = 0; i < n_vector; ++i) x0[i] = kept<Rounded>(row, x[i], o[i], x0[i]).value;
    }
    if (p.history_count > 0) {
#pragma unroll
      for (int h = 0; h < kMaxHistory; ++h)
        if (h < p.history_count && reads_slot(row, h)) add(row.k_j[h], at.history[h], n, first, p.elements, next);
    }
    float sigma[n_vector];
    if (kLearned && row.sigma != 0) {
      load(at.out, n, p.elements + first, 2 * p.elements, sigma);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) sigma[i] = learned_sigma<Rounded>(row, sigma[i]).value;
    }
    if (!row.plain) {
      if (kGuided && row.k_u != 0) add(row.k_u, at.out_uncond, n, first, p.elements, next);
      if (!kLearned && row.k_g != 0) add(row.k_g, at.grad, n, first, p.elements, next);
      if (kLearned && row.k_g != 0) {
        float g[n_vector];
        load(at.grad, n, first, p.elements, g);
#pragma unroll
        for (int i = 0; i < n_vector; ++i) next[i] = (next[i] + learned_shift<Rounded>(row, sigma[i], g[i])).value;
      }
    }
    if (row.sigma != 0) {
      float z[n_vector];
      normals(seed, row.address, kReverseStep, first, z);
      if (!row.plain) add_noises(row, seed, first, z);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) next[i] = (next[i] + Rounded(kLearned ? sigma[i] : row.sigma) * z[i]).value;
    }
    if (!row.plain && blends(row)) {
      float known[n_vector] = {}, mask[n_vector];
      load(at.known, n, first, p.elements, known);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) known[i] = (Rounded(row.b_0) * known[i]).value;
      if (row.b_z != 0) {
        const Noise<n_vector> noise = more_noise<n_vector>(seed, row.address, kKnown, first);
#pragma unroll
        for (int i = 0; i < n_vector; ++i) known[i] = (known[i] + Rounded(row.b_z) * noise.z[i]).value;
      }
      load(at.mask, n, first, p.elements, mask);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) next[i] = blended<Rounded>(mask[i], next[i], known[i]).value;
    }
    store(at.x_next, n, first, p.elements, next);
    if (at.kept.view.data) store(at.kept, n, first, p.elements, x0);
  });
}

template <class T, bool kGuided, bool kLearned>
const char* launch(const ReverseStepParams& p, Stream stream) {
  Accesses<T> at;
  at.x = Access<T>(p.x, p.elements);
  at.out = Access<T>(p.out, p.elements);
  at.out_uncond = Access<T>(p.out_uncond, p.elements);
  at.grad = Access<T>(p.grad, p.elements);
  at.known = Access<T>(p.known, p.elements);
  at.mask = Access<T>(p.mask, p.elements);
  at.x_next = Access<T>(p.x_next, p.elements);
  at.kept = Access<T>(p.kept, p.elements);
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
