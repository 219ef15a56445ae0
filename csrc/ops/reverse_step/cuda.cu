// One step of a sampler (math/update.h) with its noise. A thread does 16 bytes at a time: what its row uses is read once,
// but for out_uncond and the gradient in the few samplers that use them twice, and x_next is written once. The row is
// chosen by an index in device memory, so that no launch waits for the host and a CUDA graph can replay it.

#include "math/update.h"

#include "cuda/elements.cuh"
#include "row.h"

namespace diffkern::cuda {

namespace {

template <class T>
struct Accesses {
  Access<T> x, out, out_uncond, grad, known, mask, x_next, kept, history[kMaxHistory];
};

// The row once more, from the cache: what is used only from here on takes no registers before.
DIFFKERN_FN Row read_again(const ReverseStepParams& p, int64_t step) {
  asm volatile("" ::: "memory");
  return read_row(p, step);
}

template <int n>
struct Noise {
  float z[n];
};

// For the noises that few rows draw: in line, they would take registers from all.
template <int n>
__device__ __noinline__ Noise<n> more_noise(uint64_t seed, int64_t address, uint32_t stream, int64_t first) {
  Noise<n> noise;
  normals(seed, address, stream, first, noise.z);
  return noise;
}

// z = the sum of the row's noises; NaN if one has no address.
template <int n>
DIFFKERN_FN void sum_noises(const Row& row, uint64_t seed, int64_t first, float (&z)[n]) {
  const bool valid = has_address(row);
  const uint32_t count = valid ? uint32_t(row.count) : 1;
  normals(seed, valid ? row.address : -1, kReverseStep, first, z);
#pragma unroll 1
  for (uint32_t i = 1; i < count; ++i) {
    const Noise<n> term = more_noise<n>(seed, row.address - i, kReverseStep, first);
#pragma unroll
    for (int e = 0; e < n; ++e) z[e] = __fadd_rn(z[e], term.z[e]);
  }
}

// Blocks that a multiprocessor must have registers for: of float32, as many as without the terms that few samplers have.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;

template <class T, bool kGuided, bool kLearned>
__global__ void __launch_bounds__(256, kBlocks<T>) reverse_step_kernel(const __grid_constant__ ReverseStepParams p, const __grid_constant__ Accesses<T> at) {
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
    Row row = read_row(p, step);

    float x[n_vector], o[n_vector] = {}, x0[n_vector], next[n_vector];
    load(at.x, n, first, p.elements, x);
    if (at.out.view.data) load(at.out, n, first, p.elements, o);
    if (kGuided) {
      float uncond[n_vector];
      load(at.out_uncond, n, first, p.elements, uncond);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) o[i] = guided<Rounded>(row.w, o[i], uncond[i]).value;
    }
#pragma unroll
    for (int i = 0; i < n_vector; ++i) x0[i] = predicted_x0<Rounded>(row, x[i], o[i]).value;
    if (row.p_g != 0) {
      float g[n_vector];
      load(at.grad, n, first, p.elements, g);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) x0[i] = (x0[i] + Rounded(row.p_g) * g[i]).value;
    }
#pragma unroll
    for (int i = 0; i < n_vector; ++i) {
      x0[i] = clamped<Rounded>(x0[i], row.limit).value;
      next[i] = next_mean<Rounded>(row, x[i], o[i], x0[i]).value;
    }
    if (at.kept.view.data) {  // stored last: it may lie where an input does
#pragma unroll
      for (int i = 0; i < n_vector; ++i) x0[i] = kept<Rounded>(row, x[i], o[i], x0[i]).value;
    }
#pragma unroll
    for (int h = 0; h < kMaxHistory; ++h)
      if (h < p.history_count && reads_slot(row, h)) {
        float earlier[n_vector];
        load(at.history[h], n, first, p.elements, earlier);
        const Rounded k = row.k_j[h];
#pragma unroll
        for (int i = 0; i < n_vector; ++i) next[i] = (next[i] + k * earlier[i]).value;
      }
    if (kGuided && row.k_u != 0) {
      float uncond[n_vector];
      load(at.out_uncond, n, first, p.elements, uncond);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) next[i] = (next[i] + Rounded(row.k_u) * uncond[i]).value;
    }
    row = read_again(p, step);
    float sigma[n_vector];
    if (kLearned && row.sigma != 0) {
      load(at.out, n, p.elements + first, 2 * p.elements, sigma);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) sigma[i] = learned_sigma<Rounded>(row, sigma[i]).value;
    }
    if (row.k_g != 0) {
      float g[n_vector];
      load(at.grad, n, first, p.elements, g);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) {
        const Rounded shift = kLearned ? learned_shift<Rounded>(row, sigma[i], g[i]) : Rounded(row.k_g) * g[i];
        next[i] = (next[i] + shift).value;
      }
    }
    if (row.sigma != 0) {
      float z[n_vector];
      sum_noises(row, uint64_t(p.seeds[n]), first, z);
#pragma unroll
      for (int i = 0; i < n_vector; ++i)
        next[i] = (next[i] + Rounded(kLearned ? sigma[i] : row.sigma) * z[i]).value;
    }
    if (blends(row)) {
      float noisy[n_vector], mask[n_vector];
      load(at.known, n, first, p.elements, noisy);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) noisy[i] = (Rounded(row.b_0) * noisy[i]).value;
      if (row.b_z != 0) {
        const int64_t address = has_address(row) ? row.address : -1;
        const Noise<n_vector> noise = more_noise<n_vector>(uint64_t(p.seeds[n]), address, kKnown, first);
#pragma unroll
        for (int i = 0; i < n_vector; ++i) noisy[i] = (noisy[i] + Rounded(row.b_z) * noise.z[i]).value;
      }
      load(at.mask, n, first, p.elements, mask);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) next[i] = blended<Rounded>(mask[i], next[i], noisy[i]).value;
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
