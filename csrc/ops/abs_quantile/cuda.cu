// The quantile of |x0_hat|, before it is clamped, of each sample. A block has a sample, whose x0_hat is made again for
// each of the five passes over it: from what the L2 cache holds after the first.

#include "cuda/elements.cuh"
#include "math/update.h"
#include "ops/reverse_step/row.h"
#include "params.h"
#include "select.h"

namespace diffkern::cuda {

namespace {

constexpr int kThreads = 512;

template <class T>
struct Accesses {
  Access<T> x, out, out_uncond, grad;
};

// Calls visit(key) for every element of the sample that is this thread's.
template <class T, class Visit>
DIFFKERN_FN void for_each_key(const ReverseStepParams& p, const Accesses<T>& at, const Row& row, int64_t n,
                              Visit visit) {
  constexpr int n_vector = kVector<T>;
  for (int64_t first = int64_t(threadIdx.x) * n_vector; first < p.elements; first += kThreads * n_vector) {
    float x[n_vector], o[n_vector] = {}, other[n_vector];
    load(at.x, n, first, p.elements, x);
    if (at.out.view.data) load(at.out, n, first, p.elements, o);
    if (at.out_uncond.view.data) {
      load(at.out_uncond, n, first, p.elements, other);
#pragma unroll
      for (int i = 0; i < n_vector; ++i) o[i] = guided<Rounded>(row.w, o[i], other[i]).value;
    }
    if (row.p_g != 0) load(at.grad, n, first, p.elements, other);
#pragma unroll
    for (int i = 0; i < n_vector; ++i) {
      Rounded x0 = predicted_x0<Rounded>(row, x[i], o[i]);
      if (row.p_g != 0) x0 = x0 + Rounded(row.p_g) * other[i];
      if (first + i < p.elements) visit(uint32_t(as_int(x0)) & 0x7FFFFFFFu);
    }
  }
}

template <class T>
__global__ void abs_quantile_kernel(const __grid_constant__ AbsQuantileParams params,
                                    const __grid_constant__ Accesses<T> at) {
  __shared__ uint32_t counts[kBins], above, largest;
  const ReverseStepParams& p = params.step;
  const double rank = params.q * double(p.elements - 1);
  for (int64_t n = blockIdx.x; n < p.samples; n += gridDim.x) {
    const int64_t step = p.step[n * p.step_stride];
    if (step < 0 || step >= p.rows) {
      if (threadIdx.x == 0) params.quantile[n] = nan();
      continue;
    }
    const Row row = read_row(p, step);
    Selection s = select_rank(uint32_t(rank));
    while (s.shift > 0) {
      for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
      __syncthreads();
      for_each_key(p, at, row, n, [&](uint32_t key) {
        const int bin = bin_of(s, key);
        if (bin >= 0) atomicAdd(counts + bin, 1u);
      });
      __syncthreads();
      narrow(s, counts);  // every thread for itself
      __syncthreads();
    }
    if (threadIdx.x == 0) above = ~0u, largest = 0;
    __syncthreads();
    uint32_t own_above = ~0u, own_largest = 0;
    for_each_key(p, at, row, n, [&](uint32_t key) {
      if (key > s.prefix && key < own_above) own_above = key;
      if (key > own_largest) own_largest = key;
    });
    atomicMin(&above, own_above);
    atomicMax(&largest, own_largest);
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t next = s.rank + 1 < s.equal || above == ~0u ? s.prefix : above;
      const double weight = rank - double(uint32_t(rank));
      params.quantile[n] =
          largest > kInfinityKey ? nan() : between(__int_as_float(s.prefix), __int_as_float(next), weight);
    }
    __syncthreads();
  }
}

}  // namespace

const char* abs_quantile(const AbsQuantileParams& p, Stream stream) {
  return with_type(p.step.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Accesses<T> at;
    at.x = Access<T>(p.step.x, p.step.elements);
    at.out = Access<T>(p.step.out, p.step.elements);
    at.out_uncond = Access<T>(p.step.out_uncond, p.step.elements);
    at.grad = Access<T>(p.step.grad, p.step.elements);
    const Plan plan{uint32_t(p.step.samples < 65535 ? p.step.samples : 65535), 1, kThreads};
    return launch_kernel(abs_quantile_kernel<T>, plan, stream, p, at);
  });
}

}  // namespace diffkern::cuda
