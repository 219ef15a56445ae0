// softmax(q k^T scale) v without the tokens x tokens matrix: products of bfloat16, or of floats as sums of bfloat16
// terms (gemm_bf16.h); softmax and sums of float32. For heads of whole blocks of channels.
//
// A work item is a block of queries of one head, in groups of 32, which meet the keys a block at a time (attention.cpp).
// Keys, and then their values, are packed as the right-hand sides of the two products; probabilities become terms too.

#include "../math/log.h"
#include "../math/silu.h"
#include "gemm_bf16.h"
#include "kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kQueries = 2 * kRows;                    // of a group
constexpr int64_t kGroups = kTermsQueries / kQueries;      // of a work item at most
constexpr int64_t kSums = kQueries * kColumns;            // from a panel of sums to the next
constexpr int64_t kHalf = kColumns / 2;
template <int terms>
constexpr int64_t kKeys = terms == 3 ? 64 : 128;  // that meet

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of tokens of one head.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;

  Tokens(const HeadsView& x, int64_t sample, int64_t head, int64_t first)
      : data(static_cast<T*>(x.data) + sample * x.sample_stride + head * x.head_stride + first * x.token_stride),
        stride(x.token_stride) {}
  T* operator[](int64_t token) const { return data + token * stride; }
};

// The terms of a block of channels, `apart` from each other.
template <int terms>
DIFFKERN_FN void split(const float* x, BFloat16* to, int64_t apart) {
  for (int64_t l = 0; l < kDepth; l += kLanes) store_terms<terms>(to + l, apart, load(x + l));
}
template <int terms>
DIFFKERN_FN void split(const BFloat16* x, BFloat16* to, int64_t) {
  std::memcpy(to, x, kDepth * sizeof *to);
}

// Queries, and what is known of them over the keys so far.
template <int terms>
struct alignas(64) Group {
  BFloat16 q[kMaxTermsHead * terms * kQueries];  // [blocks of channels, terms, kQueries, kDepth]
  BFloat16 p[kKeys<terms> * terms * kQueries];   // [blocks of keys, terms, kQueries, kDepth]: exp(score - max)
  float out[kMaxTermsHead * kQueries];           // [panels of channels, kQueries, kColumns]: sums of p v
  float max[kQueries], sum[kQueries];            // of scores, and of exp(score - max)
  int64_t tiles;
};

// As the left-hand side; queries that are not there are 0.
template <int terms, class T>
void pack_queries(Group<terms>& group, const Tokens<T>& q, int64_t count, int64_t channels) {
  constexpr int64_t apart = kQueries * kDepth;
  BFloat16* to = group.q;
  group.tiles = count > kRows ? 2 : 1;
  for (int64_t i = 0; i < kQueries; ++i) group.max[i] = -__builtin_inff(), group.sum[i] = 0;
  for (int64_t c = 0; c < channels; c += kDepth, to += (terms - 1) * apart)
    for (int64_t i = 0; i < kQueries; ++i, to += kDepth)
      if (i < count)
        split<terms>(q[i] + c, to, apart);
      else
        for (int64_t term = 0; term < terms; ++term) std::memset(to + term * apart, 0, kDepth * sizeof *to);
}

// k^T, as the right-hand side [panels of keys, blocks of channels, terms, 2, kDepth / 2, 16 keys, 2]: pairs of channels
// turn. Keys that are not there are the last one.
template <int terms, class T>
void pack_keys(const Tokens<T>& k, int64_t count, int64_t channels, BFloat16* to) {
  constexpr int64_t apart = kHalf * kDepth;
  alignas(64) BFloat16 rows[terms * apart];  // [terms, 16 keys, kDepth]
  for (int64_t key = 0; key < count; key += kColumns)
    for (int64_t c = 0; c < channels; c += kDepth, to += 2 * terms * apart)
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t j = 0; j < kHalf; ++j)
          split<terms>(k[min(key + half * kHalf + j, count - 1)] + c, rows + j * kDepth, apart);
        for (int64_t term = 0; term < terms; ++term) {
          BFloat16* const turned = to + (2 * term + half) * apart;
          for (int64_t j = 0; j < kHalf; j += 4)
            for (int64_t pair = 0; pair < kDepth; pair += 2 * kLanes) {
              f32v x[4];
              for (int64_t i = 0; i < 4; ++i)
                std::memcpy(&x[i], rows + term * apart + (j + i) * kDepth + pair, sizeof x[i]);
              transpose_quads(x);
              for (int64_t i = 0; i < 4; ++i)
                for (int64_t l = 0; l < kLanes; l += 4)
                  std::memcpy(turned + ((pair / 2 + l + i) * kHalf + j) * 2, (const float*)&x[i] + l,
                              4 * sizeof(float));
            }
        }
      }
}

// v, as the right-hand side [panels of channels, blocks of keys, terms, 2, kDepth / 2, 16 channels, 2]: keys in pairs.
// Those that are not there are 0.
template <int terms, class T>
void pack_values(const Tokens<T>& v, int64_t count, int64_t channels, BFloat16* to) {
  constexpr int64_t apart = kColumns * kDepth;
  for (int64_t c = 0; c < channels; c += kColumns)
    for (int64_t key = 0; key < count; key += kDepth, to += terms * apart)
      for (int64_t k = 0; k < kDepth; k += 2) {
        alignas(64) BFloat16 rows[2][terms * kColumns] = {};  // [2 keys, terms, kColumns]
        for (int64_t i = 0; i < 2; ++i)
          if (key + k + i < count) split<terms>(v[key + k + i] + c, rows[i], kColumns);
        for (int64_t term = 0; term < terms; ++term)
          for (int64_t l = 0; l < kColumns; l += kLanes) {
            const BFloat16* const low = rows[0] + term * kColumns + l;
            const BFloat16* const high = rows[1] + term * kColumns + l;
            const i32v pairs = load_16_bits(low) | load_16_bits(high) << 16;
            std::memcpy(to + term * apart + l / kHalf * kDepth * kHalf + k * kHalf + l % kHalf * 2, &pairs,
                        sizeof pairs);
          }
      }
}

// c [panels, kQueries, kColumns] = a b, or c + a b; a is [blocks, terms, kQueries, kDepth].
template <int terms>
void multiply_all(const BFloat16* a, int64_t tiles, int64_t blocks, const BFloat16* b, int64_t panels, float* c,
                  bool add) {
  constexpr int64_t term = kQueries * kDepth, tap = 0;
  const RowsOfA rows{.tile = {a, a + kRows * kDepth}, .row = kDepth, .block = terms * term, .term = term,
                     .blocks = blocks, .tap = &tap};
  for (int64_t panel = 0; panel < panels; ++panel) {
    const Product product{.parts = &rows, .part_count = 1, .taps = 1,
                          .b = b + panel * blocks * terms * kDepth * kColumns, .c = c + panel * kSums, .add = add};
    if (tiles == 2)
      multiply<2, terms>(product);
    else
      multiply<1, terms>(product);
  }
}

// p = exp(s scale - max), for so many more keys: s is [panels of keys, kQueries, kColumns]. What was summed up with a
// smaller max shrinks.
template <int terms>
void online_softmax(Group<terms>& group, float* s, float scale, bool first, int64_t keys, int64_t panels) {
  alignas(64) float present[kKeys<terms>], largest[kQueries], shrink[kQueries];
  for (int64_t key = 0; key < kKeys<terms>; ++key) present[key] = key < keys ? 1.0f : 0.0f;
  const int64_t queries = group.tiles * kRows, scores = parts(keys, kColumns) * kSums, sums = panels * kSums;
  for (int64_t i = 0; i < queries; ++i) {
    f32v all = broadcast(group.max[i]);
    for (int64_t j = i * kColumns; j < scores; j += kSums)
      for (int64_t l = j; l < j + kColumns; l += kLanes) {
        const f32v z = load(s + l) * scale;
        store(s + l, z);
        all = max(z, all);
      }
    largest[i] = reduce_max(all);
  }
  for (int64_t i = 0; i < queries; i += kLanes) {
    const f32v now = load(largest + i), less = first ? f32v{} : exp_approx(load(group.max + i) - now);
    store(shrink + i, less);
    store(group.max + i, now);
    store(group.sum + i, load(group.sum + i) * less);
  }
  for (int64_t i = 0; i < queries; ++i) {
    f32v all{};
    for (int64_t block = 0; block * kSums < scores; ++block)
      for (int64_t l = 0; l < kColumns; l += kLanes) {
        const f32v score = load(s + block * kSums + i * kColumns + l);
        const f32v e = exp_approx(score - largest[i]) * load(present + block * kColumns + l);
        store_terms<terms>(group.p + (block * terms * kQueries + i) * kDepth + l, kQueries * kDepth, e);
        all = all + e;
      }
    group.sum[i] += reduce_add(all);
  }
  for (int64_t i = 0; i < queries && !first; ++i)
    if (shrink[i] != 1)
      for (int64_t j = i * kColumns; j < sums; j += kSums)
        for (int64_t l = j; l < j + kColumns; l += kLanes) store(group.out + l, load(group.out + l) * shrink[i]);
}

template <int terms, class T>
void attend(const AttentionParams& p, int64_t begin, int64_t end) {
  alignas(64) BFloat16 packed[kKeys<terms> * kMaxTermsHead * terms];
  alignas(64) float s[kKeys<terms> * kQueries];
  Group<terms> groups[kGroups];
  const Unit unit;
  const int64_t blocks = p.query_blocks(), panels = p.channels / kColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / blocks / p.heads, head = item / blocks % p.heads;
    const int64_t first = item % blocks * p.query_block, count = min(p.query_block, p.queries - first);
    Group<terms>* const last = groups + parts(count, kQueries);
    for (Group<terms>* group = groups; group < last; ++group) {
      const int64_t done = (group - groups) * kQueries;
      pack_queries<terms>(*group, Tokens<T>(p.q, sample, head, first + done), min(kQueries, count - done), p.channels);
    }
    for (int64_t key = 0; key < p.keys; key += kKeys<terms>) {
      const int64_t keys = min(kKeys<terms>, p.keys - key), key_blocks = parts(keys, kDepth);
      pack_keys<terms>(Tokens<T>(p.k, sample, head, key), keys, p.channels, packed);
      for (Group<terms>* group = groups; group < last; ++group) {
        multiply_all<terms>(group->q, group->tiles, panels, packed, key_blocks, s, false);
        online_softmax(*group, s, p.scale, key == 0, keys, panels);
      }
      pack_values<terms>(Tokens<T>(p.v, sample, head, key), keys, p.channels, packed);
      for (Group<terms>* group = groups; group < last; ++group)
        multiply_all<terms>(group->p, group->tiles, key_blocks, packed, panels, group->out, key > 0);
    }
    const Tokens<T> out(p.out, sample, head, first);
    for (int64_t i = 0; i < count; ++i) {
      const Group<terms>& group = groups[i / kQueries];
      const float* const sums = group.out + i % kQueries * kColumns;
      for (int64_t c = 0; c < p.channels; c += kLanes)
        store(out[i] + c, load(sums + c / kColumns * kSums + c % kColumns) * (1 / group.sum[i % kQueries]));
    }
    float* const lse = p.lse + (sample * p.heads + head) * p.queries + first;
    for (int64_t i = 0; i < count; i += kLanes) {
      const Group<terms>& group = groups[i / kQueries];
      const f32v all = load(group.max + i % kQueries) + log(load(group.sum + i % kQueries));
      std::memcpy(lse + i, &all, min(kLanes, count - i) * sizeof *lse);
    }
  }
}

}  // namespace

void attention_terms(const AttentionParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) return attend<1, BFloat16>(p, begin, end);
  switch (p.terms) {
    case 1: return attend<1, float>(p, begin, end);
    case 2: return attend<2, float>(p, begin, end);
    case 3: return attend<3, float>(p, begin, end);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
