// Attention and its gradients without tensor cores: for float32 and bfloat16 on Turing, for rows that are not of
// aligned 16-byte pieces, for any number of channels. All arithmetic is float32.
//
// A block owns 64 rows of one head and adds up 64, 128, 256 or 512 channels of one sum over the tokens that they meet,
// 64 at a time; a grid's y runs over such slices of the channels. Threads are 16 x 16: thread (y, x) has rows y + 16 i,
// tokens x + 16 j of the scores and channels 64 c + 4 x + 0..3 of the sums. Each sum has a kernel of its own:
//
//     sum   rows     tokens   weights of    scores            their gradients
//     out   queries  keys     v             q k^T             -
//     dq    queries  keys     k             q k^T             grad_out v^T
//     dk    keys     queries  q             k q^T             v grad_out^T
//     dv    keys     queries  grad_out      k q^T             -
//
// Operands are staged as float32 in shared memory, 32 channels at a time for the scores and 64 for the sums. Rows of
// 36 and 68 floats keep the 16-byte reads of eight lanes in different banks, and of 80 the scores of two rows.

#include "cuda.cuh"

namespace diffkern::cuda {

namespace {

constexpr int kSide = 16, kThreads = kAnyThreads, kPer = 4;  // threads along a side, and rows or tokens of each
static_assert(kThreads == kSide * kSide && kTokens == kSide * kPer);
constexpr int kDepth = 32, kDepthPitch = kDepth + 4, kTokenPitch = kTokens + 16, kChannelPitch = kChannels + 4;

enum class Sum { out, grad_q, grad_k, grad_v };

// The tokens of one head, of any dtype.
struct AnyRows {
  const void* data;
  DType dtype;
  int64_t offset, stride;
  int count;

  __device__ __forceinline__ float load(int token, int64_t channel) const {
    const int64_t i = offset + token * stride + channel;
    switch (dtype) {
      case DType::bf16: return to_f32(static_cast<const __nv_bfloat16*>(data)[i]);
      case DType::f16: return to_f32(static_cast<const __half*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }
  __device__ __forceinline__ void store(int token, int64_t channel, float value) const {
    const int64_t i = offset + token * stride + channel;
    void* const to = const_cast<void*>(data);
    switch (dtype) {
      case DType::bf16: static_cast<__nv_bfloat16*>(to)[i] = from_f32<__nv_bfloat16>(value); break;
      case DType::f16: static_cast<__half*>(to)[i] = from_f32<__half>(value); break;
      default: static_cast<float*>(to)[i] = value;
    }
  }
};

struct Thread {
  int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
};

// The scores of a thread: rows y + 16 i, tokens x + 16 j.
using Square = float[kPer][kPer];

// 64 tokens from `first`, `depth` channels from `channel`, as float32; zeros where there are none.
template <int depth>
DIFFKERN_FN void stage(float* to, const AnyRows& rows, int first, int64_t channel, int64_t channels) {
  constexpr int pitch = depth + 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTokens * depth; i += kThreads) {
    const int token = i / depth, c = i % depth;
    to[token * pitch + c] =
        first + token < rows.count && channel + c < channels ? rows.load(first + token, channel + c) : 0.0f;
  }
}

DIFFKERN_FN void read4(float (&to)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// s = rows tokens^T over all channels: sums of sums of 32, which halves the digits that long rows lose.
DIFFKERN_FN void multiply_transposed(Square& s, const AnyRows& rows, int first_row, const AnyRows& tokens,
                                     int first_token, int64_t channels, float* work) {
  const Thread thread;
  float* const token_work = work + kTokens * kDepthPitch;
#pragma unroll
  for (int i = 0; i < kPer * kPer; ++i) s[i / kPer][i % kPer] = 0;
#pragma unroll 1
  for (int64_t channel = 0; channel < channels; channel += kDepth) {
    __syncthreads();
    stage<kDepth>(work, rows, first_row, channel, channels);
    stage<kDepth>(token_work, tokens, first_token, channel, channels);
    __syncthreads();
    Square part = {};
#pragma unroll 2
    for (int c = 0; c < kDepth; c += 4) {
      float a[kPer][4], b[kPer][4];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        read4(a[i], work + (thread.y + i * kSide) * kDepthPitch + c);
        read4(b[i], token_work + (thread.x + i * kSide) * kDepthPitch + c);
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) part[i][j] += a[i][k] * b[j][k];
    }
#pragma unroll
    for (int i = 0; i < kPer * kPer; ++i) s[i / kPer][i % kPer] += part[i / kPer][i % kPer];
  }
}

// sum += weights chunk: of the thread's rows and channels, weights[row][token] in shared memory.
DIFFKERN_FN void multiply(Square& sum, const float* weights, const float* chunk) {
  const Thread thread;
#pragma unroll 2
  for (int token = 0; token < kTokens; token += 4) {
    float a[kPer][4], b[4][4];
#pragma unroll
    for (int i = 0; i < kPer; ++i) read4(a[i], weights + (thread.y + i * kSide) * kTokenPitch + token);
#pragma unroll
    for (int k = 0; k < 4; ++k) read4(b[k], chunk + (token + k) * kChannelPitch + thread.x * 4);
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i][c] += a[i][k] * b[k][c];
  }
}

// Writes 64 channels of the sums, each row times a factor, by way of shared memory: neighbours write neighbours.
DIFFKERN_FN void write(const AnyRows& to, int first_row, int64_t channel, int64_t channels, const Square& sum,
                       const float (&factor)[kPer], float* work) {
  const Thread thread;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    *reinterpret_cast<float4*>(work + (thread.y + i * kSide) * kChannelPitch + thread.x * 4) =
        make_float4(sum[i][0] * factor[i], sum[i][1] * factor[i], sum[i][2] * factor[i], sum[i][3] * factor[i]);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
    const int row = i / kChannels, c = i % kChannels;
    if (first_row + row < to.count && channel + c < channels)
      to.store(first_row + row, channel + c, work[row * kChannelPitch + c]);
  }
}

template <class Combine>
DIFFKERN_FN float over_row(float value, Combine combine) {  // the 16 threads of one y
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  return value;
}

// s <- exp(scale s - max), over so many tokens more; returns what the sums before must be multiplied by in `shrink`.
DIFFKERN_FN void online_softmax(Square& s, float scale, int tokens, float (&max)[kPer], float (&sum)[kPer],
                                float (&shrink)[kPer]) {
  const Thread thread;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    float largest = max[i];
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      s[i][j] = thread.x + j * kSide < tokens ? __fmul_rn(s[i][j], scale) : -infinity();
      largest = fmaxf(largest, s[i][j]);
    }
    largest = over_row(largest, [](float a, float b) { return fmaxf(a, b); });
    float more = 0;
#pragma unroll
    for (int j = 0; j < kPer; ++j) more += s[i][j] = expf(s[i][j] - largest);
    shrink[i] = expf(max[i] - largest);
    sum[i] = sum[i] * shrink[i] + over_row(more, [](float a, float b) { return a + b; });
    max[i] = largest;
  }
}

// s <- the weights of a gradient's sum: p, or p (dp - delta).
template <bool kKeyRows>
DIFFKERN_FN void gradient_weights(const AttentionParams& p, const Place& place, Square& s, const Square* dp,
                                  int first_token) {
  const Thread thread;
  const int64_t of_head = (place.sample * p.heads + place.head) * p.queries;
#pragma unroll
  for (int i = 0; i < kPer; ++i)
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int row = place.first + thread.y + i * kSide, token = first_token + thread.x + j * kSide;
      const int query = kKeyRows ? token : row, key = kKeyRows ? row : token;
      const bool inside = query < p.queries && key < p.keys;
      s[i][j] = inside ? expf(__fmul_rn(s[i][j], p.scale) - p.lse[of_head + query]) : 0.0f;  // as forward
      if (dp && inside) s[i][j] *= (*dp)[i][j] - p.delta[of_head + query];
    }
}

template <Sum sum>
DIFFKERN_FN const HeadsView& result_of(const AttentionParams& p) {
  return sum == Sum::out ? p.out : sum == Sum::grad_q ? p.grad_q : sum == Sum::grad_k ? p.grad_k : p.grad_v;
}

template <int width, Sum kSum>
__global__ void __launch_bounds__(kThreads, 1) attention_any_kernel(const __grid_constant__ AttentionParams p) {
  constexpr bool kKeyRows = kSum == Sum::grad_k || kSum == Sum::grad_v;
  __shared__ __align__(16) float work[2 * kTokens * kDepthPitch], weights[kTokens * kTokenPitch];
  static_assert(2 * kDepthPitch >= kChannelPitch, "a chunk of the sums' operand fits where the scores' two were");

  const int rows = int(kKeyRows ? p.keys : p.queries), tokens = int(kKeyRows ? p.queries : p.keys);
  const Place place = place_of(blockIdx.x, p.heads, rows, kTokens);
  const int64_t slice = int64_t(blockIdx.y) * width;
  const auto head = [&](const HeadsView& x, int count) {
    return AnyRows{x.data, p.dtype, place.sample * x.sample_stride + place.head * x.head_stride, x.token_stride, count};
  };
  const AnyRows a = head(kKeyRows ? p.k : p.q, rows), b = head(kKeyRows ? p.q : p.k, tokens);
  const AnyRows grad_a = head(kKeyRows ? p.v : p.grad_out, rows), grad_b = head(kKeyRows ? p.grad_out : p.v, tokens);
  const AnyRows summed = kSum == Sum::out || kSum == Sum::grad_v ? grad_b : b;

  const Thread thread;
  Square result[width / kChannels] = {};
  float max[kPer], sum[kPer], factor[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) max[i] = -infinity(), sum[i] = 0;
#pragma unroll 1
  for (int token = 0; token < tokens; token += kTokens) {
    Square s, dp;
    multiply_transposed(s, a, place.first, b, token, p.channels, work);
    if constexpr (kSum == Sum::out) {
      online_softmax(s, p.scale, tokens - token, max, sum, factor);
#pragma unroll
      for (int c = 0; c < width / kChannels; ++c)
#pragma unroll
        for (int i = 0; i < kPer * 4; ++i) result[c][i / 4][i % 4] *= factor[i / 4];
    } else if constexpr (kSum == Sum::grad_v) {
      gradient_weights<kKeyRows>(p, place, s, nullptr, token);
    } else {
      multiply_transposed(dp, grad_a, place.first, grad_b, token, p.channels, work);
      gradient_weights<kKeyRows>(p, place, s, &dp, token);
    }
#pragma unroll
    for (int i = 0; i < kPer * kPer; ++i)
      weights[(thread.y + i / kPer * kSide) * kTokenPitch + thread.x + i % kPer * kSide] = s[i / kPer][i % kPer];
#pragma unroll
    for (int c = 0; c < width / kChannels; ++c) {
      if (slice + c * kChannels >= p.channels) break;
      __syncthreads();
      stage<kChannels>(work, summed, token, slice + c * kChannels, p.channels);
      __syncthreads();
      multiply(result[c], weights, work);
    }
  }

  const AnyRows to = head(result_of<kSum>(p), rows);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    factor[i] = kSum == Sum::out ? 1.0f / sum[i] : kSum == Sum::grad_v ? 1.0f : p.scale;
    const int row = place.first + thread.y + i * kSide;
    if (kSum == Sum::out && thread.x == 0 && blockIdx.y == 0 && row < rows)
      p.lse[(place.sample * p.heads + place.head) * p.queries + row] = max[i] + logf(sum[i]);
  }
#pragma unroll
  for (int c = 0; c < width / kChannels; ++c) {
    if (slice + c * kChannels >= p.channels) break;
    write(to, place.first, slice + c * kChannels, p.channels, result[c], factor, work);
  }
}

// delta = grad_out . out of each query, a warp a query.
__global__ void __launch_bounds__(kDeltaThreads) delta_any_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t item = (int64_t(blockIdx.x) * kDeltaThreads + threadIdx.x) / kAnyDeltaLanes;
  if (item >= p.samples * p.heads * p.queries) return;  // a whole warp
  const int64_t head = item / p.queries;
  const auto rows = [&](const HeadsView& x) {
    const int64_t offset = head / p.heads * x.sample_stride + head % p.heads * x.head_stride;
    return AnyRows{x.data, p.dtype, offset, x.token_stride, int(p.queries)};
  };
  const AnyRows out = rows(p.out), grad_out = rows(p.grad_out);
  const int query = int(item % p.queries);
  float sum = 0;
  for (int64_t c = threadIdx.x % 32; c < p.channels; c += 32) sum += out.load(query, c) * grad_out.load(query, c);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) p.delta[item] = sum;
}

template <Sum sum>
const char* launch(const AttentionParams& p, Stream stream) {
  const int64_t rows = sum == Sum::out || sum == Sum::grad_q ? p.queries : p.keys;
  const AttentionPlan plan = plan_attention_any(rows, p.samples * p.heads, p.channels);
  return with_slice_width(p.channels, [&](auto slice) {
    return launch_planned(attention_any_kernel<decltype(slice)::value, sum>, plan, p, stream);
  });
}

}  // namespace

const char* attention_any(const AttentionParams& p, Stream stream) { return launch<Sum::out>(p, stream); }

const char* attention_backward_any(const AttentionParams& p, Stream stream) {
  const AttentionPlan plan = plan_delta(p.queries, p.samples * p.heads, kAnyDeltaLanes);
  const char* error = launch_planned(delta_any_kernel, plan, p, stream);
  if (error == nullptr) error = launch<Sum::grad_q>(p, stream);
  if (error == nullptr) error = launch<Sum::grad_k>(p, stream);
  if (error == nullptr) error = launch<Sum::grad_v>(p, stream);
  return error;
}

}  // namespace diffkern::cuda
