// Training losses with eps made again instead of stored (math/loss.h). Forward: a block sums a chunk in a fixed order,
// then a thread sums the chunks of a sample; no atomics. Backward: a thread does 16 bytes at a time.

#include "math/loss.h"

#include "cuda/elements.cuh"
#include "params.h"

namespace diffkern::cuda {

namespace {

constexpr int kThreads = plan_sums(1, 1).threads;

// NaN for a step that the table does not have.
DIFFKERN_FN LossRow row_of(const DiffusionLossParams& p, int64_t n) {
  constexpr LossRow noise_row = kNoiseRow;
  if (p.table == nullptr) return noise_row;
  const int64_t step = p.step[n * p.step_stride];
  const bool inside = step >= 0 && step < p.rows;
  float columns[kLossColumns];
#pragma unroll
  for (int i = 0; i < kLossColumns; ++i) columns[i] = inside ? p.table[step * kLossColumns + i] : nan();
  return {columns[0], columns[1], columns[2], columns[3], columns[4],  columns[5],
          columns[6], columns[7], columns[8], columns[9], columns[10], columns[11]};
}

enum class Kind { of_noise, of_image, with_bound };  // no x_0, an x_0, and the bound's term too

// An x_0 is of the type of `out`, or float32.
template <class T>
struct Accesses {
  Access<T> out, x_0, grad_out;
  Access<float> wide_x_0;

  explicit Accesses(const DiffusionLossParams& p)
      : out(p.out, p.elements),
        x_0(p.x_0.dtype == p.out.dtype ? p.x_0 : View{}, p.elements),
        grad_out(p.grad_out, p.elements),
        wide_x_0(p.x_0.dtype == p.out.dtype ? View{} : p.x_0, p.elements) {}
};

// A vector of each operand.
template <class T>
struct Operands {
  float out[kVector<T>], x_0[kVector<T>], eps[kVector<T>];
};

template <class T>
DIFFKERN_FN void load_image(const Accesses<T>& at, int64_t n, int64_t first, int64_t elements, float (&x_0)[kVector<T>]) {
  if (at.x_0.view.data) return load(at.x_0, n, first, elements, x_0);
#pragma unroll
  for (int part = 0; part < kVector<T>; part += kVector<float>) {
    float four[kVector<float>];
    load(at.wide_x_0, n, first + part, elements, four);
#pragma unroll
    for (int i = 0; i < kVector<float>; ++i) x_0[part + i] = four[i];
  }
}

template <class T, Kind kind>
DIFFKERN_FN void load(const DiffusionLossParams& p, const Accesses<T>& at, int64_t n, int64_t first, Operands<T>& of) {
  load(at.out, n, first, p.elements, of.out);
  if (kind != Kind::of_noise) load_image(at, n, first, p.elements, of.x_0);
  const int64_t address = p.address ? p.address[n * p.address_stride] : p.step[n * p.step_stride];
  normals(uint64_t(p.seeds[n]), address, kForwardNoising, first, of.eps);
}

// NaN where the target needs an image that is not there.
template <class T, Kind kind>
DIFFKERN_FN Rounded error_of(const LossRow& row, const Operands<T>& of, int i) {
  Rounded target = Rounded(row.y_e) * of.eps[i];
  if (kind != Kind::of_noise)
    target = Rounded(row.y_x) * of.x_0[i] + target;
  else if (row.y_x != 0)
    target = nan();
  return Rounded(of.out[i]) - target;
}

// The bound's terms of a vector.
template <class T>
DIFFKERN_FN void terms_of(const DiffusionLossParams& p, const LossRow& row, const Accesses<T>& at, int64_t n,
                          int64_t first, const Operands<T>& of, BoundTerm<Rounded> (&terms)[kVector<T>]) {
  float second_half[kVector<T>];
  if (p.learned_variance) load(at.out, n, p.elements + first, 2 * p.elements, second_half);
  const float base = p.learned_variance ? row.log_var_min : row.log_var_max;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const Rounded above = p.learned_variance ? learned_log_var<Rounded>(row, second_half[i]) : Rounded(0);
    terms[i] = bound_term<Rounded>(row, p.clip, of.x_0[i], of.eps[i], of.out[i], base, above);
  }
}

// The sum of a block's `value`s, which thread 0 gets.
DIFFKERN_FN double block_sum(float value) {
  __shared__ float warp_sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += warp_sums[w];
  __syncthreads();
  return total;
}

template <class T, Kind kind>
__global__ void partial_kernel(const __grid_constant__ DiffusionLossParams p, const __grid_constant__ Accesses<T> at) {
  constexpr bool kBound = kind == Kind::with_bound;
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    const LossRow row = row_of(p, n);
    for (int64_t chunk = blockIdx.x; chunk < per_sample; chunk += gridDim.x) {
      const int64_t chunk_end = (chunk + 1) * kChunk, end = chunk_end < p.elements ? chunk_end : p.elements;
      float squares = 0, nats = 0;
      for (int64_t first = chunk * kChunk + threadIdx.x * kVector<T>; first < end; first += kThreads * kVector<T>) {
        Operands<T> of;
        load<T, kind>(p, at, n, first, of);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          const float error = first + i < p.elements ? error_of<T, kind>(row, of, i).value : 0.0f;
          squares += error * error;
        }
        if (kBound) {
          BoundTerm<Rounded> terms[kVector<T>];
          terms_of(p, row, at, n, first, of, terms);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) nats += first + i < p.elements ? terms[i].nats.value : 0.0f;
        }
      }
      double* sums = p.partial + (n * per_sample + chunk) * (kBound ? 2 : 1);
      const double square_sum = block_sum(squares), nat_sum = kBound ? block_sum(nats) : 0;
      if (threadIdx.x == 0) {
        sums[0] = square_sum;
        if (kBound) sums[1] = nat_sum;
      }
    }
  }
}

__global__ void total_kernel(const __grid_constant__ DiffusionLossParams p) {
  const int64_t per_sample = (p.elements + kChunk - 1) / kChunk, outputs = p.bound ? 2 : 1;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < p.samples; n += int64_t(gridDim.x) * blockDim.x) {
    double squares = 0, nats = 0;
    for (int64_t c = 0; c < per_sample; ++c) {
      const double* sums = p.partial + (n * per_sample + c) * outputs;
      squares += sums[0];
      if (p.bound) nats += sums[1];
    }
    const float weight = p.weights ? p.weights[n] : 1.0f;
    p.loss[n * outputs] = float(squares / double(p.elements) * row_of(p, n).weight * weight);
    if (p.bound) p.loss[n * outputs + 1] = float(nats / double(p.elements) * kBitsPerNat);
  }
}

template <class T, Kind kind>
__global__ void backward_kernel(const __grid_constant__ DiffusionLossParams p, const __grid_constant__ Accesses<T> at) {
  constexpr bool kBound = kind == Kind::with_bound;
  for_each_vector<kVector<T>>(p.samples, p.elements, [&](int64_t n, int64_t first) {
    const LossRow row = row_of(p, n);
    const LossSlopes slopes = loss_slopes(row, p.elements, p.weights ? p.weights[n] : 1.0f, kBound,
                                          p.grad_loss + n * (kBound ? 2 : 1));
    Operands<T> of;
    load<T, kind>(p, at, n, first, of);
    float grad[kVector<T>], log_var_grad[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      grad[i] = (Rounded(slopes.of_error) * error_of<T, kind>(row, of, i)).value;
      log_var_grad[i] = 0;
    }
    if (kBound && (p.learned_variance || !p.stop_mean)) {
      BoundTerm<Rounded> terms[kVector<T>];
      terms_of(p, row, at, n, first, of, terms);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        if (!p.stop_mean) grad[i] = (Rounded(grad[i]) + Rounded(slopes.of_mean) * terms[i].by_mean).value;
        log_var_grad[i] = (Rounded(slopes.of_log_var) * terms[i].by_log_var).value;
      }
    }
    store(at.grad_out, n, first, p.elements, grad);
    if (p.learned_variance) store(at.grad_out, n, p.elements + first, 2 * p.elements, log_var_grad);
  });
}

}  // namespace

const char* diffusion_loss(const DiffusionLossParams& p, Stream stream) {
  const char* error = with_type(p.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = p.bound      ? partial_kernel<T, Kind::with_bound>
                        : p.x_0.data ? partial_kernel<T, Kind::of_image>
                                     : partial_kernel<T, Kind::of_noise>;
    return launch_kernel(kernel, plan_sums(p.samples, p.elements), stream, p, Accesses<T>(p));
  });
  if (error != nullptr) return error;
  return launch_kernel(total_kernel, plan_elementwise(1, p.samples), stream, p);
}

const char* diffusion_loss_backward(const DiffusionLossParams& p, Stream stream) {
  return with_type(p.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = p.bound      ? backward_kernel<T, Kind::with_bound>
                        : p.x_0.data ? backward_kernel<T, Kind::of_image>
                                     : backward_kernel<T, Kind::of_noise>;
    return launch_kernel(kernel, plan_vectors<T>(p.samples, p.elements), stream, p, Accesses<T>(p));
  });
}

}  // namespace diffkern::cuda
