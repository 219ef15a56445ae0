// softmax(q k^T scale) v without the tokens x tokens matrix: products of bfloat16, or of floats as sums of bfloat16
// terms (gemm_bf16.h); softmax and sums of float32. For heads of whole blocks of channels.
//
// A work item is a block of queries of one head, in groups of 32, which meet the keys a block at a time, as those of
// cpu_fma.cpp do. Keys, and then their values, are packed as the right-hand sides of the two products, during which
// the next ones are asked for; probabilities become terms too. exp_approx will do for any number of terms: it is off by
// no more than the rounding of a score is.

#include "cpu/gemm_bf16.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "math/log.h"
#include "math/silu.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kQueries = 2 * kRows;                // of a group
constexpr int64_t kGroups = kTermsQueries / kQueries;  // of a work item at most
constexpr int64_t kSums = kQueries * kColumns;         // of a panel
constexpr int64_t kHalf = kColumns / 2;
template <int terms>
constexpr int64_t kKeys = terms == 3 ? 64 : 128;  // that meet

// Rows of tokens of one head.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;

  Tokens(const HeadsView& x, int64_t sample, int64_t head, int64_t first)
      : data(static_cast<T*>(x.data) + sample * x.sample_stride + head * x.head_stride + first * x.token_stride),
        stride(x.token_stride) {}
  T* operator[](int64_t token) const { return data + token * stride; }

  // Asks for these tokens, for the second-level cache.
  __attribute__((always_inline)) void ask(int64_t begin, int64_t end, int64_t channels) const {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch((*this)[token] + c, 0, 2);
  }
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
  group.tiles = count > kRows ? 2 : 1;
  for (int64_t i = 0; i < kQueries; ++i) group.max[i] = -__builtin_inff(), group.sum[i] = 0;
  for (int64_t i = 0; i < kQueries; ++i)
    for (int64_t c = 0; c < channels; c += kDepth) {
      BFloat16* const to = group.q + c * terms * kQueries + i * kDepth;
      if (i < count)
        split<terms>(q[i] + c, to, apart);
      else
        for (int64_t term = 0; term < terms; ++term) std::memset(to + term * apart, 0, kDepth * sizeof *to);
    }
}

// 16 keys from the first one by a block of channels: to[word][key], words of 32 bits. Keys behind the last repeat it.
template <class T>
DIFFKERN_FN void turn(const Tokens<T>& k, int64_t first, int64_t last, int64_t channel, void* to) {
  constexpr int64_t words = kDepth * sizeof(T) / sizeof(float);
  for (int64_t key = 0; key < kHalf; key += 4)
    for (int64_t word = 0; word < words; word += kLanes) {
      f32v x[4];
      for (int i = 0; i < 4; ++i)
        std::memcpy(&x[i], (const float*)(k[min(first + key + i, last)] + channel) + word, sizeof x[i]);
      transpose_quads(x);
      for (int i = 0; i < 4; ++i)
        for (int l = 0; l < kLanes; l += 4)
          std::memcpy((float*)to + (word + l + i) * kHalf + key, (const float*)&x[i] + l, 4 * sizeof(float));
    }
}

// k^T, as the right-hand side: [panels of keys, blocks of channels, terms, 2, kDepth / 2, 16 keys, 2], in pairs.
template <int terms, class T>
void pack_keys(const Tokens<T>& k, int64_t count, int64_t channels, BFloat16* to) {
  constexpr int64_t half = kDepth * kHalf, apart = 2 * half;
  for (int64_t key = 0; key < count; key += kColumns)
    for (int64_t c = 0; c < channels; c += kDepth, to += terms * apart)
      for (int64_t h = 0; h < 2; ++h)
        if constexpr (sizeof(T) == sizeof(BFloat16)) {
          turn(k, key + h * kHalf, count - 1, c, to + h * half);  // words are pairs
        } else {
          alignas(64) float words[half];
          turn(k, key + h * kHalf, count - 1, c, words);
          for (int64_t i = 0; i < half; i += 2 * kHalf)
            for (int64_t l = 0; l < kHalf; l += kLanes)
              store_terms<terms>(to + h * half + i + 2 * l, apart, load(words + i + l), load(words + i + kHalf + l));
        }
}

// v, as the right-hand side [panels of channels, blocks of keys, terms, 2, kDepth / 2, 16 channels, 2]: keys in pairs.
// Keys past the last are 0.
template <int terms, class T>
void pack_values(const Tokens<T>& v, int64_t count, int64_t channels, BFloat16* to) {
  constexpr int64_t half = kDepth * kHalf, apart = 2 * half;
  for (int64_t c = 0; c < channels; c += kColumns)
    for (int64_t key = 0; key < count; key += kDepth, to += terms * apart)
      for (int64_t k = key; k < key + kDepth; k += 2)
        for (int64_t l = 0; l < kColumns; l += kLanes)
          store_terms<terms>(to + l / kHalf * half + (k - key) * kHalf + l % kHalf * 2, apart,
                             k < count ? load(v[k] + c + l) : f32v{}, k + 1 < count ? load(v[k + 1] + c + l) : f32v{});
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
void online_softmax(Group<terms>& group, const float* s, float scale, bool first, int64_t keys, int64_t panels) {
  alignas(64) float present[kKeys<terms>], largest[kQueries], shrink[kQueries];
  for (int64_t key = 0; key < kKeys<terms>; ++key) present[key] = key < keys ? 1.0f : 0.0f;
  const int64_t queries = group.tiles * kRows, scores = divide_up(keys, kColumns) * kSums, sums = panels * kSums;
  for (int64_t i = 0; i < queries; ++i) {
    f32v all = broadcast(group.max[i]);
    for (int64_t j = i * kColumns; j < scores; j += kSums)
      for (int64_t l = j; l < j + kColumns; l += kLanes) all = max(load(s + l) * scale, all);
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
        const f32v score = load(s + block * kSums + i * kColumns + l) * scale;
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

// About 850 KB.
template <int terms>
struct alignas(64) Arrays {
  BFloat16 packed[kKeys<terms> * kMaxTermsHead * terms];
  float s[kKeys<terms> * kQueries];
  Group<terms> groups[kGroups];
};

template <int terms, class T>
void attend(const AttentionParams& p, int64_t begin, int64_t end) {
  auto& [packed, s, groups] = scratch<Arrays<terms>>();
  const Unit unit;
  const int64_t blocks = p.query_blocks(), panels = p.channels / kColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / blocks / p.heads, head = item / blocks % p.heads;
    const int64_t first = item % blocks * p.query_block, count = min(p.query_block, p.queries - first);
    const int64_t group_count = divide_up(count, kQueries);
    for (int64_t g = 0; g < group_count; ++g)
      pack_queries<terms>(groups[g], Tokens<T>(p.q, sample, head, first + g * kQueries),
                          min(kQueries, count - g * kQueries), p.channels);
    for (int64_t key = 0; key < p.keys; key += kKeys<terms>) {
      const int64_t keys = min(kKeys<terms>, p.keys - key), key_blocks = divide_up(keys, kDepth);
      const Tokens<T> k(p.k, sample, head, key), v(p.v, sample, head, key), next(p.k, sample, head, key + keys);
      pack_keys<terms>(k, keys, p.channels, packed);
      for (int64_t g = 0; g < group_count; ++g) {
        v.ask(keys * g / group_count, keys * (g + 1) / group_count, p.channels);
        multiply_all<terms>(groups[g].q, groups[g].tiles, panels, packed, key_blocks, s, false);
        online_softmax(groups[g], s, p.scale, key == 0, keys, panels);
      }
      pack_values<terms>(v, keys, p.channels, packed);
      const int64_t next_keys = min(kKeys<terms>, p.keys - key - keys);
      for (int64_t g = 0; g < group_count; ++g) {
        next.ask(next_keys * g / group_count, next_keys * (g + 1) / group_count, p.channels);
        multiply_all<terms>(groups[g].p, groups[g].tiles, key_blocks, packed, panels, groups[g].out, key > 0);
      }
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
