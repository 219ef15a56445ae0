// The parameters of attention and of its gradient.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "dtype.h"
#include "integers.h"

namespace diffkern {

// [N, heads, tokens, d], the channels of a token together.
struct HeadsView {
  void* data;
  int64_t sample_stride, head_stride, token_stride;
};

// out = softmax(q k^T scale) v
struct AttentionParams {
  HeadsView q, k, v, out;
  DType dtype;  // of them and their gradients: float32 on the CPU, but for attention_terms
  int64_t samples, heads, queries, keys, channels;
  float scale;
  float* lse;                                  // [N, heads, queries]: ln sum_key exp(scale q . k)
  HeadsView grad_out, grad_q, grad_k, grad_v;  // backward only
  float* grad_q_parts;                         // [spans - 1, N, queries, heads, d]: the first span's part is in grad_q
  float* delta;                                // [N, heads, queries]: grad_out . out. CUDA only, which has no parts

  // CPU only. A forward work item is a block of queries of one head, a backward one a span of its keys.
  int terms;            // of bfloat16, whose sum is a number; 0 in attention
  int64_t query_block;  // up to kAttentionBlock in attention, kTermsQueries in attention_terms
  int64_t key_span;     // whole blocks
  int64_t query_blocks() const { return divide_up(queries, query_block); }
  int64_t key_spans() const { return divide_up(keys, key_span); }
};

constexpr int64_t kAttentionBlock = 64;  // tokens of a block
constexpr int64_t kMaxTermsHead = 256;   // channels of a head in attention_terms, at most
constexpr int64_t kTermsQueries = 256;   // queries of a work item of attention_terms, at most

namespace cuda {
const char* attention(const AttentionParams&, Stream);
const char* attention_backward(const AttentionParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
