// The gradients of attention (Dao et al. 2022, algorithm 4; Dao 2023), on tensor cores, with the same bits each time.
//
// Three kernels, no atomics:
//   delta   grad_out . out of each query, eight lanes a query
//   dk, dv  a block owns keys of one head and meets its queries 64 at a time
//   dq      a block owns queries of one head and meets its keys 64 at a time
// The latter two are one kernel. Its rows have two operands, a and b, and so have the tokens that they meet:
//
//               a    b     first  second    rows     columns    sums
//     dk, dv    k    v     q      grad_out  keys     queries    dk += ds first, dv += p second
//     dq        q    grad_out  k  v         queries  keys       dq += ds first
//
//   s = a first^T, dp = b second^T, p = exp(scale s - lse), ds = p (dp - delta); dq and dk times scale at the end
//
// so both make s and dp again: 4 + 3 products where one kernel with atomics, or with parts of dq to add up, needs 5.
// Up to 64 channels a chunk of first and second stays in shared memory for both of its uses; beyond it comes twice, the
// second time from the L2 cache. The work of a warp and of the ring is the forward's (cuda.cu, cuda.cuh).

#include "cuda.cuh"

namespace diffkern::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t row = (int64_t(blockIdx.x) * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int64_t query = row % p.queries, head = row / p.queries % p.heads, sample = row / p.queries / p.heads;
  float sum = 0;
  if (sample < p.samples) {
    const T* out = rows_of<const T>(p.out, sample, head, p.queries).data + query * p.out.token_stride;
    const T* grad_out = rows_of<const T>(p.grad_out, sample, head, p.queries).data + query * p.grad_out.token_stride;
    for (int64_t c = threadIdx.x % kDeltaLanes * kVector<T>; c < p.channels; c += kDeltaLanes * kVector<T>) {
      const Packed<T> a = *reinterpret_cast<const Packed<T>*>(out + c);
      const Packed<T> b = *reinterpret_cast<const Packed<T>*>(grad_out + c);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum += to_f32(a.value[i]) * to_f32(b.value[i]);
    }
  }
#pragma unroll
  for (int offset = kDeltaLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % kDeltaLanes == 0 && sample < p.samples) p.delta[row] = sum;
}

// The statistics of a query; beyond the last one, those by which every probability is 0.
struct Statistics {
  float lse, delta;
};

DIFFKERN_FN Statistics statistics_of(const AttentionParams& p, const Place& place, int64_t query) {
  if (query >= p.queries) return {infinity(), 0.0f};
  const int64_t i = (place.sample * p.heads + place.head) * p.queries + query;
  return {p.lse[i], p.delta[i]};
}

// s <- p and dp <- ds. Statistics are the rows', or in shared memory the columns'; only so many columns are there.
template <class Tiling, bool kKeyRows>
DIFFKERN_FN void probabilities(Scores<Tiling>& s, Scores<Tiling>& dp, float scale, int columns,
                               const Statistics (&of_row)[Tiling::row_tiles][2], const Statistics* of_column) {
  const Warp<Tiling> warp;
#pragma unroll
  for (int n = 0; n < kShare<Tiling> / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = warp.column_warp * kShare<Tiling> + n * 8 + warp.q * 2 + i;
      Statistics at_column{};
      if (kKeyRows) at_column = of_column[column];
      for_each_row<Tiling>([&](int m, int, int half) {
        const Statistics at_row = kKeyRows ? at_column : of_row[m][half];
        float& score = s[m][n][2 * half + i];
        float& grad = dp[m][n][2 * half + i];
        score = exp_approx(__fmul_rn(score, scale) - at_row.lse);  // rounded as forward
        if (!kKeyRows && column >= columns) score = 0;
        grad = score * (grad - at_row.delta);
      });
    }
}

template <class T, class Tiling>
DIFFKERN_FN void put_all(uint32_t owned, Scores<Tiling> (&sum)[Tiling::chunks], float scale) {
#pragma unroll
  for (int c = 0; c < Tiling::chunks; ++c) {
#pragma unroll
    for (int i = 0; i < Tiling::row_tiles * kShare<Tiling> / 2; ++i) (&sum[c][0][0][0])[i] *= scale;
    put<T, Tiling>(owned + c * Tiling::owned_chunk, sum[c]);
  }
}

template <class T, class Tiling, bool kKeyRows>
DIFFKERN_FN void differentiate(const AttentionParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t a_chunks = shared_address(shared), b_chunks = a_chunks + Tiling::owner;
  const uint32_t slots = a_chunks + Tiling::owned, exchange = slots + Tiling::ring;
  Statistics* const of_column = reinterpret_cast<Statistics*>(shared + Tiling::owned + Tiling::ring + Tiling::scores);
  const int rows = int(kKeyRows ? p.keys : p.queries), columns = int(kKeyRows ? p.queries : p.keys);
  const Place place = place_of(blockIdx.x, p.heads, rows, Tiling::rows);
  const int channels = int(p.channels);
  const auto head = [&](const HeadsView& x, int tokens) {
    return rows_of<const T>(x, place.sample, place.head, tokens);
  };

  fetch_owned<Tiling>(a_chunks, head(kKeyRows ? p.k : p.q, rows), place.first, channels);
  fetch_owned<Tiling>(b_chunks, head(kKeyRows ? p.v : p.grad_out, rows), place.first, channels);
  constexpr int kParts = Tiling::held ? 2 : kKeyRows ? 4 : 3, kOrder = Tiling::held ? 0b01 : kKeyRows ? 0b1001 : 0b001;
  Ring<Tiling, const T, kParts, kOrder> ring(slots, head(kKeyRows ? p.q : p.k, columns),
                                             head(kKeyRows ? p.grad_out : p.v, columns), channels);
  Statistics of_row[Tiling::row_tiles][2] = {};
  if (!kKeyRows)
    for_each_row<Tiling>(
        [&](int m, int row, int half) { of_row[m][half] = statistics_of(p, place, place.first + row); });

  Scores<Tiling> grad_a[Tiling::chunks] = {}, grad_b[kKeyRows ? Tiling::chunks : 1] = {};
  for (int token = 0; token < columns; token += kTokens) {
    Scores<Tiling> s = {}, dp = {};
    uint32_t first = 0, second = 0;
#pragma unroll 1
    for (int channel = 0; channel < channels; channel += kChannels) {
      second = ring.next();
      if (kKeyRows && channel == 0 && threadIdx.x < kTokens)
        of_column[threadIdx.x] = statistics_of(p, place, token + threadIdx.x);
      multiply_transposed<T, Tiling>(dp, owned_chunk<Tiling>(b_chunks, channel), second, channels - channel);
    }
#pragma unroll 1
    for (int channel = 0; channel < channels; channel += kChannels) {
      first = ring.next();
      multiply_transposed<T, Tiling>(s, owned_chunk<Tiling>(a_chunks, channel), first, channels - channel);
    }
    probabilities<Tiling, kKeyRows>(s, dp, p.scale, columns - token, of_row, of_column);
    Operand<T, Tiling> operand;
    as_operand<T, Tiling>(operand, dp, exchange);
#pragma unroll
    for (int c = 0; c < Tiling::chunks; ++c) {
      if (c * kChannels >= channels) break;
      if (!Tiling::held) first = ring.next();
      multiply<T, Tiling>(grad_a[c], operand, first, channels - c * kChannels);
    }
    if constexpr (kKeyRows) {
      as_operand<T, Tiling>(operand, s, exchange);
#pragma unroll
      for (int c = 0; c < Tiling::chunks; ++c) {
        if (c * kChannels >= channels) break;
        if (!Tiling::held) second = ring.next();
        multiply<T, Tiling>(grad_b[c], operand, second, channels - c * kChannels);
      }
    }
  }

  const auto grad = [&](const HeadsView& x) { return rows_of<T>(x, place.sample, place.head, rows); };
  __syncthreads();  // a and b are no longer read
  put_all<T, Tiling>(a_chunks, grad_a, p.scale);
  if constexpr (kKeyRows) put_all<T, Tiling>(b_chunks, grad_b, 1.0f);
  write_rows<Tiling>(grad(kKeyRows ? p.grad_k : p.grad_q), a_chunks, place.first, channels);
  if constexpr (kKeyRows) write_rows<Tiling>(grad(p.grad_v), b_chunks, place.first, channels);
}

template <class T, class Tiling, bool turing, bool kKeyRows>
__global__ void __launch_bounds__(Tiling::threads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionParams p) {
  if constexpr (turing == kTuring)
    differentiate<T, Tiling, kKeyRows>(p);
  else
    __trap();  // never launched: tensor_cores_for knows for which architecture this was compiled
}

template <class T, TensorCores cores>
const char* launch(const AttentionParams& p, Stream stream) {
  constexpr bool turing = cores == TensorCores::f16_turing;
  const int64_t heads = p.samples * p.heads;
  const char* error = launch_planned(delta_kernel<T>, plan_delta(p.queries, heads, kDeltaLanes), p, stream);
  if (error != nullptr) return error;
  return with_backward_tiling<cores>(p.channels, [&](auto tiling) {
    using Tiling = decltype(tiling);
    const char* error = launch_planned(attention_backward_kernel<T, Tiling, turing, true>,
                                       plan_of<Tiling>(p.keys, heads), p, stream);
    if (error != nullptr) return error;
    return launch_planned(attention_backward_kernel<T, Tiling, turing, false>, plan_of<Tiling>(p.queries, heads), p,
                          stream);
  });
}

}  // namespace

const char* attention_backward(const AttentionParams& p, Stream stream) {
  const bool pieces = in_pieces(p, {p.q, p.k, p.v, p.out, p.grad_out, p.grad_q, p.grad_k, p.grad_v});
  switch (tensor_cores_for(p.dtype, pieces, delta_kernel<float>)) {
    case TensorCores::f16_turing: return launch<__half, TensorCores::f16_turing>(p, stream);
    case TensorCores::f16: return launch<__half, TensorCores::f16>(p, stream);
    case TensorCores::bf16: return launch<__nv_bfloat16, TensorCores::bf16>(p, stream);
    case TensorCores::tf32: return launch<float, TensorCores::tf32>(p, stream);
    case TensorCores::none: return attention_backward_any(p, stream);
  }
  return "unknown tensor cores";
}

}  // namespace diffkern::cuda
