// softmax(q k^T scale) v without the tokens x tokens matrix (Milakov & Gimelshein 2018; Dao 2023), on tensor cores.
//
// A block owns queries of one head and keeps them in shared memory; keys and values come in 64 at a time, 64 channels
// at a time (cuda.cuh). Each warp has 16 queries, or 32: it adds up their scores with 64 keys over the channels,
// makes probabilities of them where they are, in registers, and these are the left operand of the product with the
// values. Sums are float32, probabilities are rounded to the inputs' dtype; products of float32 are three of its halves
// (mma.cuh). Up to 256 channels the warp holds its
// queries' whole sums; beyond, two warps share 16 queries, each with half of the keys' scores and half of the channels.
//
// Bytes: q is read once, out and lse are written once, k and v are read once by each block, from the L2 cache but for
// the first time. A barrier for each chunk of 8 KiB.
//
// The products around it stay with cuBLAS: q, k, v and the projection are tokens x channels by channels x channels, and
// plain. Fused into this one, k and v would be made again for each block of queries, and the norm before them too. No
// copy stands between them: the norm writes the channels of a token together (channels_last), the products take them as
// rows and give [N, tokens, heads, d], whose strides this kernel reads; out is written so, as the projection's rows.
//
// Dtypes without a tensor-core product here (float32 and bfloat16 on Turing, float32 of more than 256 channels), and
// rows that are not of aligned 16-byte pieces, go to cuda_any.cu.

#include "cuda.cuh"

namespace diffkern::cuda {

namespace {

// The running softmax of each query of a warp, over the keys so far.
template <class Tiling>
struct Softmax {
  float max[Tiling::row_tiles][2];  // of its scores
  float sum[Tiling::row_tiles][2];  // of exp(score - max), of the lane's keys

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * Tiling::row_tiles; ++i) max[i / 2][i % 2] = -infinity(), sum[i / 2][i % 2] = 0;
  }
};

// The largest (or the sum) over the lanes, and then the warps, that share a row.
template <class Tiling, class Combine>
DIFFKERN_FN void combine_over_row(float (&value)[Tiling::row_tiles][2], float* shared, Combine combine) {
  const Warp<Tiling> warp;
  for_each_row<Tiling>([&](int m, int row, int half) {
    float& v = value[m][half];
    v = combine(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    v = combine(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
    if (Tiling::column_warps > 1 && warp.q == 0) shared[warp.column_warp * Tiling::rows + row] = v;
  });
  if constexpr (Tiling::column_warps > 1) {
    __syncthreads();
    for_each_row<Tiling>([&](int m, int row, int half) {
      value[m][half] = shared[row];
#pragma unroll
      for (int c = 1; c < Tiling::column_warps; ++c)
        value[m][half] = combine(value[m][half], shared[c * Tiling::rows + row]);
    });
  }
}

// s <- exp(scale s - max), for so many keys more; shrink is what the sums over the keys before must be multiplied by.
template <class Tiling>
DIFFKERN_FN void online_softmax(Softmax<Tiling>& state, Scores<Tiling>& s, float scale, int keys, float* shared,
                                float (&shrink)[Tiling::row_tiles][2]) {
  const Warp<Tiling> warp;
  float largest[Tiling::row_tiles][2];
  for_each_row<Tiling>([&](int m, int, int half) {
    largest[m][half] = state.max[m][half];
#pragma unroll
    for (int n = 0; n < kShare<Tiling> / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int key = warp.column_warp * kShare<Tiling> + n * 8 + warp.q * 2 + i % 2;
        s[m][n][i] = key < keys ? __fmul_rn(s[m][n][i], scale) : -infinity();
        largest[m][half] = fmaxf(largest[m][half], s[m][n][i]);
      }
  });
  combine_over_row<Tiling>(largest, shared, [](float a, float b) { return fmaxf(a, b); });
  for_each_row<Tiling>([&](int m, int, int half) {
    shrink[m][half] = exp_approx(state.max[m][half] - largest[m][half]);
    state.max[m][half] = largest[m][half];
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kShare<Tiling> / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[m][n][i] = exp_approx(s[m][n][i] - largest[m][half]);
        sum += s[m][n][i];
      }
    state.sum[m][half] = state.sum[m][half] * shrink[m][half] + sum;
  });
}

template <class Tiling>
DIFFKERN_FN void scale_rows(Scores<Tiling> (&sum)[Tiling::chunks], const float (&factor)[Tiling::row_tiles][2]) {
#pragma unroll
  for (int c = 0; c < Tiling::chunks; ++c)
    for_each_row<Tiling>([&](int m, int, int half) {
#pragma unroll
      for (int n = 0; n < kShare<Tiling> / 8; ++n) {
        sum[c][m][n][2 * half] *= factor[m][half];
        sum[c][m][n][2 * half + 1] *= factor[m][half];
      }
    });
}

template <class T, class Tiling>
DIFFKERN_FN void attend(const AttentionParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_chunks = shared_address(shared), slots = q_chunks + Tiling::owned, exchange = slots + Tiling::ring;
  float* const row_values = reinterpret_cast<float*>(shared + Tiling::owned + Tiling::ring + Tiling::scores);
  const Place place = place_of(blockIdx.x, p.heads, p.queries, Tiling::rows);
  const int channels = int(p.channels);

  fetch_owned<Tiling>(q_chunks, rows_of<const T>(p.q, place.sample, place.head, p.queries), place.first, channels);
  Ring<Tiling, const T, 2, 0b10> ring(slots, rows_of<const T>(p.k, place.sample, place.head, p.keys),
                                      rows_of<const T>(p.v, place.sample, place.head, p.keys), channels);
  Scores<Tiling> out[Tiling::chunks] = {};
  Softmax<Tiling> state;
  for (int key = 0; key < p.keys; key += kTokens) {
    Scores<Tiling> s = {};
#pragma unroll 1
    for (int channel = 0; channel < channels; channel += kChannels) {
      const uint32_t k_chunk = ring.next();
      multiply_transposed<T, Tiling>(s, owned_chunk<Tiling>(q_chunks, channel), k_chunk, channels - channel);
    }
    float shrink[Tiling::row_tiles][2];
    online_softmax<Tiling>(state, s, p.scale, int(p.keys) - key, row_values, shrink);
    scale_rows<Tiling>(out, shrink);
    Operand<T, Tiling> probabilities;
    as_operand<T, Tiling>(probabilities, s, exchange);
#pragma unroll
    for (int c = 0; c < Tiling::chunks; ++c) {
      if (c * kChannels >= channels) break;
      const uint32_t v_chunk = ring.next();
      multiply<T, Tiling>(out[c], probabilities, v_chunk, channels - c * kChannels);
    }
  }

  const Warp<Tiling> warp;
  float inverse[Tiling::row_tiles][2];
  combine_over_row<Tiling>(state.sum, row_values, [](float a, float b) { return a + b; });
  float* const lse = p.lse + (place.sample * p.heads + place.head) * p.queries + place.first;
  for_each_row<Tiling>([&](int m, int row, int half) {
    inverse[m][half] = 1.0f / state.sum[m][half];
    if (warp.q == 0 && warp.column_warp == 0 && place.first + row < p.queries)
      lse[row] = state.max[m][half] + logf(state.sum[m][half]);
  });
  scale_rows<Tiling>(out, inverse);
#pragma unroll
  for (int c = 0; c < Tiling::chunks; ++c) put<T, Tiling>(q_chunks + c * Tiling::owned_chunk, out[c]);
  write_rows<Tiling>(rows_of<T>(p.out, place.sample, place.head, p.queries), q_chunks, place.first, channels);
}

template <class T, class Tiling, bool turing>
__global__ void __launch_bounds__(Tiling::threads, 1) attention_kernel(const __grid_constant__ AttentionParams p) {
  if constexpr (turing == kTuring)
    attend<T, Tiling>(p);
  else
    __trap();  // never launched: tensor_cores_for knows for which architecture this was compiled
}

template <class T, TensorCores cores>
const char* launch(const AttentionParams& p, Stream stream) {
  constexpr bool turing = cores == TensorCores::f16_turing;
  return with_forward_tiling<cores>(p.queries, p.channels, [&](auto tiling) {
    using Tiling = decltype(tiling);
    const AttentionPlan plan = plan_of<Tiling>(p.queries, p.samples * p.heads);
    return launch_planned(attention_kernel<T, Tiling, turing>, plan, p, stream);
  });
}

}  // namespace

const char* attention(const AttentionParams& p, Stream stream) {
  const bool pieces = in_pieces(p, {p.q, p.k, p.v, p.out});
  switch (tensor_cores_for(p.dtype, pieces, attention_kernel<__half, Tiling<64, 4, 1, 1, 1>, true>)) {
    case TensorCores::f16_turing: return launch<__half, TensorCores::f16_turing>(p, stream);
    case TensorCores::f16: return launch<__half, TensorCores::f16>(p, stream);
    case TensorCores::bf16: return launch<__nv_bfloat16, TensorCores::bf16>(p, stream);
    case TensorCores::tf32: return launch<float, TensorCores::tf32>(p, stream);
    case TensorCores::none: return attention_any(p, stream);
  }
  return "unknown tensor cores";
}

}  // namespace diffkern::cuda
