// The quantile of |x0_hat|, before it is clamped, of each sample. A work item is a sample, whose x0_hat is made again
// for each of the five passes over it.

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"
#include "math/update.h"
#include "ops/reverse_step/row.h"
#include "select.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

struct Buffers {
  Buffer x, out, uncond, grad;
  alignas(64) uint32_t keys[kChunk];
  uint32_t counts[kBins];
};

// Calls visit(key) for every element of the sample.
template <class Visit>
DIFFKERN_FN void for_each_key(const ReverseStepParams& p, const Row& row, int64_t sample, Buffers& buffers,
                              Visit visit) {
  for (int64_t first = 0; first < p.elements; first += kChunk) {
    const int64_t left = p.elements - first;
    const Chunk chunk{sample, first, int(left < kChunk ? left : kChunk)};
    const float* x = staged(p.x, chunk, buffers.x);
    const float* out = p.out.data ? staged(p.out, chunk, buffers.out) : nullptr;
    const float* uncond = p.out_uncond.data ? staged(p.out_uncond, chunk, buffers.uncond) : nullptr;
    const float* grad = row.p_g != 0 ? staged(p.grad, chunk, buffers.grad) : nullptr;
    for (int i = 0; i < chunk.padded(); i += kLanes) {
      f32v o = out ? load(out + i) : f32v{};
      if (uncond) o = guided(row.w, o, load(uncond + i));
      f32v x0 = predicted_x0(row, load(x + i), o);
      if (grad) x0 = x0 + row.p_g * load(grad + i);
      const u32v keys = (u32v)x0 & 0x7FFFFFFFu;
      std::memcpy(buffers.keys + i, &keys, sizeof keys);
    }
    for (int i = 0; i < chunk.count; ++i) visit(buffers.keys[i]);
  }
}

float as_number(uint32_t key) {
  float number;
  std::memcpy(&number, &key, sizeof number);
  return number;
}

}  // namespace

void abs_quantile(const AbsQuantileParams& params, int64_t begin, int64_t end) {
  const ReverseStepParams& p = params.step;
  Buffers& buffers = scratch<Buffers>();
  uint32_t* const counts = buffers.counts;
  const double rank = params.q * double(p.elements - 1);
  for (int64_t n = begin; n < end; ++n) {
    const Row row = read_row(p, p.step[n * p.step_stride]);
    Selection s = select_rank(uint32_t(rank));
    while (s.shift > 0) {
      std::memset(counts, 0, sizeof buffers.counts);
      for_each_key(p, row, n, buffers, [&](uint32_t key) {
        const int bin = bin_of(s, key);
        if (bin >= 0) ++counts[bin];
      });
      narrow(s, counts);
    }
    uint32_t above = ~0u, largest = 0;
    for_each_key(p, row, n, buffers, [&](uint32_t key) {
      if (key > s.prefix && key < above) above = key;
      if (key > largest) largest = key;
    });
    if (s.rank + 1 < s.equal || above == ~0u) above = s.prefix;  // the next one is the same number
    const float quantile = between(as_number(s.prefix), as_number(above), rank - double(uint32_t(rank)));
    params.quantile[n] = largest > kInfinityKey ? __builtin_nanf("") : quantile;
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
