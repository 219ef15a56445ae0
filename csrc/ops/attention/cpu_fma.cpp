// softmax(q k^T scale) v without the tokens x tokens matrix (Milakov & Gimelshein 2018; Dao et al. 2022).
//
// Forward: a work item is a block of queries of one head. The block is transposed once, and its scores with a block of
// keys are kept as s[key][query]: queries lie along the registers, so that the softmax over keys needs no sum across
// lanes, and both products broadcast what they need straight from memory (gemm.h). No key, no value and no probability
// is ever copied.
//
// Backward (Dao et al. 2022, algorithm 4): a work item is a span of keys of one head, taken in blocks. It makes the
// probabilities again from lse, sums its rows of dk and dv over the queries, and its part of dq; the parts are added up
// in the order of the spans afterwards.
//
// Sums may be contracted here (*_fma.cpp in CMakeLists.txt): their bits depend on the level anyway, by its width.

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "math/exp.h"
#include "math/log.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kBlock = kAttentionBlock;  // tokens that lie along the registers
constexpr int64_t kKeys = 128;               // that a forward block of queries meets at a time
constexpr int64_t kQueries = 96;             // that a backward block of keys meets at a time
constexpr int64_t kChain = 128;              // channels that a score adds up one by one; more would cost precision

// Rows of tokens of one head.
struct Rows {
  float* data;
  int64_t stride;
  Rows from(int64_t token) const { return {data + token * stride, stride}; }
};

Rows rows_of(const HeadsView& x, int64_t sample, int64_t head) {
  return {static_cast<float*>(x.data) + sample * x.sample_stride + head * x.head_stride, x.token_stride};
}

// Up to kBlock tokens along the registers, data[channel][token]; the channels one after another, so many at a time.
struct Transposed {
  float* data;
  int64_t channels;
};

// s[i][j] = scale rows[i] . block[j]. If the block fits in `transposed` whole, it is put there only when `fresh`.
void scores(Rows rows, int64_t row_count, Rows block, int64_t block_count, int64_t channels, float scale,
            Transposed transposed, bool fresh, float* s) {
  for (int64_t c = 0; c < channels; c += transposed.channels) {
    const int64_t depth = channels - c < transposed.channels ? channels - c : transposed.channels;
    if (fresh || channels > transposed.channels)
      transpose(block.data + c, block.stride, block_count, depth, scale, transposed.data, kBlock);
    for (int64_t part = 0; part < depth; part += kChain)
      multiply({.rows = row_count, .columns = whole_registers(block_count),
                .depth = depth - part < kChain ? depth - part : kChain,
                .a = rows.data + c + part, .a_row = rows.stride, .a_depth = 1,
                .b = transposed.data + part * kBlock, .b_depth = kBlock,
                .c = s, .c_row = kBlock, .add = c + part > 0});
  }
}

// The running softmax of each query of a block, over the keys so far.
struct Softmax {
  float max[kBlock], sum[kBlock];  // of its scores, and of exp(score - max)
  float shrink[kBlock];            // exp(max before the last keys - max)
};

// s[key][query] <- exp(s - max), for so many queries more keys.
void online_softmax(Softmax& state, float* s, int64_t keys, int64_t queries) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const f32v before = load(state.max + i);
    f32v largest = before, sum{};
    for (int64_t j = 0; j < keys; ++j) largest = max(load(s + j * kBlock + i), largest);
    for (int64_t j = 0; j < keys; ++j) {
      const f32v p = exp(load(s + j * kBlock + i) - largest);
      store(s + j * kBlock + i, p);
      sum = sum + p;
    }
    const f32v shrink = exp(before - largest);
    store(state.max + i, largest);
    store(state.sum + i, multiply_add(load(state.sum + i), shrink, sum));
    store(state.shrink + i, shrink);
  }
}

// Channels of a block that are transposed at a time.
constexpr int64_t kForwardDepth = 512, kBackwardDepth = 256;

struct alignas(64) ForwardArrays {
  float q_t[kForwardDepth * kBlock], s[kKeys * kBlock];
};

struct alignas(64) BackwardArrays {
  float k_t[kBackwardDepth * kBlock], v_t[kBackwardDepth * kBlock];
  float prob[kQueries * kBlock], grad_s[kQueries * kBlock];
};

float dot(const float* a, const float* b, int64_t count) {
  f32v sum{};
  for (; count > kLanes; count -= kLanes, a += kLanes, b += kLanes) sum = multiply_add(load(a), load(b), sum);
  return reduce_add(multiply_add(load(a, int(count)), load(b, int(count)), sum));
}

}  // namespace

void attention(const AttentionParams& p, int64_t begin, int64_t end) {
  auto& [q_t, s] = scratch<ForwardArrays>();
  alignas(64) float inverse[kBlock], lse[kBlock];
  const int64_t blocks = p.query_blocks();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / blocks / p.heads, head = item / blocks % p.heads;
    const int64_t first = item % blocks * p.query_block;
    const int64_t queries = p.queries - first < p.query_block ? p.queries - first : p.query_block;
    const Rows q = rows_of(p.q, sample, head).from(first), out = rows_of(p.out, sample, head).from(first);
    Softmax state;
    for (int64_t i = 0; i < queries; i += kLanes) {
      store(state.max + i, broadcast(-__builtin_inff()));
      store(state.sum + i, f32v{});
    }
    for (int64_t key = 0; key < p.keys; key += kKeys) {
      const int64_t keys = p.keys - key < kKeys ? p.keys - key : kKeys;
      const bool last = key + keys == p.keys;
      const Rows k = rows_of(p.k, sample, head).from(key), v = rows_of(p.v, sample, head).from(key);
      scores(k, keys, q, queries, p.channels, p.scale, {q_t, kForwardDepth}, key == 0, s);
      online_softmax(state, s, keys, queries);
      for (int64_t i = 0; last && i < queries; i += kLanes) {
        const f32v sum = load(state.sum + i);
        store(inverse + i, 1.0f / sum);
        store(lse + i, load(state.max + i) + log(sum));
      }
      multiply({.rows = queries, .columns = p.channels, .depth = keys,
                .a = s, .a_row = 1, .a_depth = kBlock,
                .b = v.data, .b_depth = v.stride,
                .c = out.data, .c_row = out.stride, .add = key > 0, .before = state.shrink,
                .after = last ? inverse : nullptr});
    }
    std::memcpy(p.lse + (sample * p.heads + head) * p.queries + first, lse, queries * sizeof(float));
  }
}

void attention_backward(const AttentionParams& p, int64_t begin, int64_t end) {
  auto& [k_t, v_t, prob, grad_s] = scratch<BackwardArrays>();
  const int64_t span = p.key_span, spans = p.key_spans();
  const int64_t elements = p.samples * p.queries * p.heads * p.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / spans / p.heads, head = item / spans % p.heads, first = item % spans * span;
    const int64_t last = first + span < p.keys ? first + span : p.keys;
    HeadsView part = p.grad_q;
    if (item % spans > 0) part.data = p.grad_q_parts + (item % spans - 1) * elements;
    for (int64_t key = first; key < last; key += kBlock) {
      const int64_t keys = last - key < kBlock ? last - key : kBlock;
      const Rows k = rows_of(p.k, sample, head).from(key), grad_k = rows_of(p.grad_k, sample, head).from(key);
      const Rows v = rows_of(p.v, sample, head).from(key), grad_v = rows_of(p.grad_v, sample, head).from(key);
      for (int64_t query = 0; query < p.queries; query += kQueries) {
        const int64_t queries = p.queries - query < kQueries ? p.queries - query : kQueries;
        const Rows q = rows_of(p.q, sample, head).from(query), grad_q = rows_of(part, sample, head).from(query);
        const Rows out = rows_of(p.out, sample, head).from(query);
        const Rows grad_out = rows_of(p.grad_out, sample, head).from(query);
        const float* lse = p.lse + (sample * p.heads + head) * p.queries + query;
        scores(q, queries, k, keys, p.channels, p.scale, {k_t, kBackwardDepth}, query == 0, prob);
        scores(grad_out, queries, v, keys, p.channels, 1.0f, {v_t, kBackwardDepth}, query == 0, grad_s);
        for (int64_t i = 0; i < queries; ++i) {
          const float delta = dot(grad_out.from(i).data, out.from(i).data, p.channels);
          for (int64_t j = i * kBlock; j < i * kBlock + keys; j += kLanes) {
            const f32v p_ij = exp(load(prob + j) - lse[i]);
            store(prob + j, p_ij);
            store(grad_s + j, p_ij * (load(grad_s + j) - delta) * p.scale);
          }
        }
        multiply({.rows = keys, .columns = p.channels, .depth = queries,
                  .a = prob, .a_row = 1, .a_depth = kBlock,
                  .b = grad_out.data, .b_depth = grad_out.stride,
                  .c = grad_v.data, .c_row = grad_v.stride, .add = query > 0});
        multiply({.rows = keys, .columns = p.channels, .depth = queries,
                  .a = grad_s, .a_row = 1, .a_depth = kBlock,
                  .b = q.data, .b_depth = q.stride,
                  .c = grad_k.data, .c_row = grad_k.stride, .add = query > 0});
        multiply({.rows = queries, .columns = p.channels, .depth = keys,
                  .a = grad_s, .a_row = kBlock, .a_depth = 1,
                  .b = k.data, .b_depth = k.stride,
                  .c = grad_q.data, .c_row = grad_q.stride, .add = key > first});
      }
    }
  }
}

void attention_sum_grad_q(const AttentionParams& p, int64_t begin, int64_t end) {
  const int64_t elements = p.samples * p.queries * p.heads * p.channels;
  float* const grad_q = static_cast<float*>(p.grad_q.data);
  const int64_t last = end * kChunk < elements ? end * kChunk : elements;
  for (int64_t part = 0; part < p.key_spans() - 1; ++part)
    for (int64_t i = begin * kChunk; i < last; ++i) grad_q[i] += p.grad_q_parts[part * elements + i];
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
