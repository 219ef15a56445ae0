// softmax(q k^T scale) v of bfloat16 without the tokens x tokens matrix: products of bfloat16 (gemm_bf16.h), softmax
// and sums of float32. For inference, and heads of whole blocks of channels.
//
// A work item is a block of queries of one head, which meets the keys a block at a time (attention.cpp). Keys, and then
// their values, are packed as the right-hand sides of the two products; probabilities are rounded to bfloat16.

#include "../math/silu.h"
#include "gemm_bf16.h"
#include "kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kQueries = kAttentionBlock, kKeys = 128;  // that meet
constexpr int64_t kTiles = kQueries / kRows;
constexpr int64_t kMaxPanels = kMaxBFloat16Head / kColumns;
constexpr int64_t kTile = kRows * kColumns;
constexpr int64_t kHalf = kColumns / 2;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of tokens of one head.
struct Tokens {
  BFloat16* data;
  int64_t stride;

  Tokens(const HeadsView& x, int64_t sample, int64_t head, int64_t first)
      : data(static_cast<BFloat16*>(x.data) + sample * x.sample_stride + head * x.head_stride + first * x.token_stride),
        stride(x.token_stride) {}
  BFloat16* operator[](int64_t token) const { return data + token * stride; }
};

// As the left-hand side [blocks of channels, kQueries, kDepth]; tokens that are not there are 0.
void pack_queries(const Tokens& q, int64_t count, int64_t channels, BFloat16* to) {
  for (int64_t c = 0; c < channels; c += kDepth)
    for (int64_t i = 0; i < kQueries; ++i, to += kDepth)
      if (i < count)
        std::memcpy(to, q[i] + c, kDepth * sizeof *to);
      else
        std::memset(to, 0, kDepth * sizeof *to);
}

// k^T, as the right-hand side [panels of keys, blocks of channels, 2, kDepth / 2, 16 keys, 2]: pairs of channels turn.
// Keys that are not there are the last one.
void pack_keys(const Tokens& k, int64_t count, int64_t channels, BFloat16* to) {
  for (int64_t key = 0; key < count; key += kColumns)
    for (int64_t c = 0; c < channels; c += kDepth)
      for (int64_t half = key; half < key + kColumns; half += kHalf, to += kDepth * kHalf)
        for (int64_t j = 0; j < kHalf; j += 4)
          for (int64_t pair = 0; pair < kDepth; pair += 2 * kLanes) {
            f32v rows[4];
            for (int i = 0; i < 4; ++i)
              std::memcpy(&rows[i], k[min(half + j + i, count - 1)] + c + pair, sizeof rows[i]);
            transpose_quads(rows);
            for (int i = 0; i < 4; ++i)
              for (int l = 0; l < kLanes; l += 4)
                std::memcpy(to + ((pair / 2 + l + i) * kHalf + j) * 2, (const float*)&rows[i] + l, 4 * sizeof(float));
          }
}

// v, as the right-hand side [panels of channels, blocks of keys, 2, kDepth / 2, 16 channels, 2]: keys in pairs. Those
// that are not there are 0.
void pack_values(const Tokens& v, int64_t count, int64_t channels, BFloat16* to) {
  for (int64_t c = 0; c < channels; c += kColumns)
    for (int64_t key = 0; key < count; key += kDepth)
      for (int64_t half = c; half < c + kColumns; half += kHalf)
        for (int64_t k = key; k < key + kDepth; k += 2, to += kColumns)
          for (int64_t l = 0; l < kHalf; l += kLanes) {
            const i32v low = k < count ? load_16_bits(v[k] + half + l) : i32v{};
            const i32v high = k + 1 < count ? load_16_bits(v[k + 1] + half + l) : i32v{};
            const i32v pairs = low | high << 16;
            std::memcpy(to + 2 * l, &pairs, sizeof pairs);
          }
}

// c [panels of B, kTiles, kRows, kColumns] = a b, or c + a b; a is [blocks, kQueries, kDepth].
void multiply_all(const BFloat16* a, int64_t blocks, const BFloat16* b, int64_t panels, float* c, bool add) {
  const int64_t tap = 0;
  for (int64_t tile = 0; tile < kTiles; tile += 2) {
    const RowsOfA rows{.tile = {a + tile * kRows * kDepth, a + (tile + 1) * kRows * kDepth}, .row = kDepth,
                       .block = kQueries * kDepth, .term = 0, .blocks = blocks, .tap = &tap};
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply<2, 1>({.parts = &rows, .part_count = 1, .taps = 1, .b = b + panel * blocks * kDepth * kColumns,
                   .c = c + (panel * kTiles + tile) * kTile, .add = add});
  }
}

// Of each query of a block, over the keys so far.
struct Softmax {
  float max[kQueries], sum[kQueries];  // of its scores, and of exp(score - max)
};

// p [blocks of keys, kQueries, kDepth] = exp(s scale - max), for so many queries more keys. What was summed up with a
// smaller max shrinks.
void online_softmax(Softmax& state, float* s, float scale, bool first, int64_t keys, int64_t queries, BFloat16* p,
                    float* out, int64_t panels) {
  alignas(64) float present[kKeys];
  for (int64_t key = 0; key < kKeys; ++key) present[key] = key < keys ? 1.0f : 0.0f;
  constexpr int64_t next = kTiles * kTile;  // panel
  const int64_t blocks = parts(keys, kColumns);
  for (int64_t i = 0; i < queries; ++i) {
    float *const scores = s + i * kColumns, *const sums = out + i * kColumns;
    f32v largest = broadcast(first ? -__builtin_inff() : state.max[i]), sum{};
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t l = 0; l < kColumns; l += kLanes) {
        const f32v z = load(scores + block * next + l) * scale;
        store(scores + block * next + l, z);
        largest = max(z, largest);
      }
    const float now = reduce_max(largest);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t l = 0; l < kColumns; l += kLanes) {
        const f32v e = exp_approx(load(scores + block * next + l) - now) * load(present + block * kColumns + l);
        store(p + (block * kQueries + i) * kDepth + l, e);
        sum = sum + e;
      }
    const float shrink = first ? 0 : exp_approx(broadcast(state.max[i] - now))[0];
    state.max[i] = now;
    state.sum[i] = (first ? 0 : state.sum[i] * shrink) + reduce_add(sum);
    if (first || shrink == 1) continue;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t l = 0; l < kColumns; l += kLanes)
        store(sums + panel * next + l, load(sums + panel * next + l) * shrink);
  }
}

}  // namespace

void attention_bf16(const AttentionParams& p, int64_t begin, int64_t end) {
  alignas(64) BFloat16 q[kQueries * kMaxBFloat16Head], packed[kKeys * kMaxBFloat16Head];
  alignas(64) BFloat16 probabilities[kQueries * kKeys];
  alignas(64) float s[kKeys * kQueries], out[kMaxPanels * kTiles * kTile];
  const Unit unit;
  const int64_t blocks = attention_blocks(p.queries), panels = p.channels / kColumns;
  std::memset(probabilities, 0, sizeof probabilities);  // those of queries that are not there
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / blocks / p.heads, head = item / blocks % p.heads, first = item % blocks * kQueries;
    const int64_t queries = min(kQueries, p.queries - first);
    Softmax state;
    pack_queries({p.q, sample, head, first}, queries, p.channels, q);
    for (int64_t key = 0; key < p.keys; key += kKeys) {
      const int64_t keys = min(kKeys, p.keys - key);
      pack_keys({p.k, sample, head, key}, keys, p.channels, packed);
      multiply_all(q, panels, packed, parts(keys, kColumns), s, false);
      online_softmax(state, s, p.scale, key == 0, keys, queries, probabilities, out, panels);
      pack_values({p.v, sample, head, key}, keys, p.channels, packed);
      multiply_all(probabilities, parts(keys, kDepth), packed, panels, out, key > 0);
    }
    const Tokens y(p.out, sample, head, first);
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t c = 0; c < p.channels; c += kLanes)
        store(y[i] + c, load(out + c / kColumns * kTiles * kTile + i * kColumns + c % kColumns) * (1 / state.sum[i]));
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
