// One step of a sampler (math/update.h) with its noise. A work item is a chunk of one sample: what its row uses is read
// once, and x_next is written once.

#include "math/update.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"
#include "row.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

struct Buffers {
  Buffer x, out, uncond, variance, grad, history[kMaxHistory], x_next, kept, known, mask, z, term;
};

// A chunk's elements, of what its row uses.
struct Operands {
  int count;
  const float *x, *out, *uncond, *variance, *grad, *z;
  int slots;  // of the history, those that the row reads
  float k[kMaxHistory];
  const float* slot[kMaxHistory];
  float *x_next, *kept;
};

// z = the sum of the row's noises. What is wanted afterwards comes with the first.
DIFFKERN_FN void sum_noises(const ReverseStepParams& p, const Row& row, const Chunk& chunk, Buffers& buffers,
                            const Wanted& uncond) {
  const uint64_t seed = uint64_t(p.seeds[chunk.sample]);
  normals(NoiseAddress(seed, row.address, kReverseStep), chunk.first, chunk.padded(), buffers.z.data,
          wanted(p.x, chunk), wanted(p.out, chunk), uncond);
  for (uint32_t i = 1; i < row.count; ++i) {
    const NoiseAddress address(seed, row.address - i, kReverseStep);
    normals(address, chunk.first, chunk.padded(), buffers.term.data);
    for (int e = 0; e < chunk.padded(); e += kLanes)
      store(buffers.z.data + e, load(buffers.z.data + e) + load(buffers.term.data + e));
  }
}

void blend(const ReverseStepParams& p, const Row& row, const Chunk& chunk, Buffers& buffers, float* x_next) {
  const float* z = buffers.z.data;
  if (row.b_z != 0) {
    const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), row.address, kKnown);
    normals(address, chunk.first, chunk.padded(), buffers.z.data);
  }
  const float* known = staged(p.known, chunk, buffers.known);
  const float* mask = staged(p.mask, chunk, buffers.mask);
  for (int i = 0; i < chunk.padded(); i += kLanes) {
    f32v noisy = row.b_0 * load(known + i);
    if (row.b_z != 0) noisy = noisy + row.b_z * load(z + i);
    store(x_next + i, blended(load(mask + i), load(x_next + i), noisy));
  }
}

// The loop of plain rows is short, and has no branches for what the rows of few samplers have.
template <bool kGuided, bool kLearned, bool kNoisy, bool kPlain>
__attribute__((noinline)) void update(const Row& of_sample, const Operands& of_chunk) {
  const Row row = of_sample;  // a copy, that what is stored cannot change
  const Operands at = of_chunk;
  for (int i = 0; i < at.count; i += kLanes) {
    const f32v x = load(at.x + i);
    f32v o = !kPlain && !at.out ? f32v{} : load(at.out + i);
    if constexpr (kGuided) o = guided(row.w, o, load(at.uncond + i));
    f32v x0 = predicted_x0(row, x, o);
    if (!kPlain && row.p_g != 0) x0 = x0 + row.p_g * load(at.grad + i);
    x0 = clamped(x0, row.limit);
    f32v next = next_mean(row, x, o, x0);
    for (int s = 0; s < at.slots; ++s) next = next + at.k[s] * load(at.slot[s] + i);
    if constexpr (kGuided && !kPlain)
      if (row.k_u != 0) next = next + row.k_u * load(at.uncond + i);
    f32v sigma = f32v{} + row.sigma;
    if constexpr (kNoisy && kLearned) sigma = learned_sigma(row, load(at.variance + i));
    if (!kPlain && row.k_g != 0) {
      const f32v g = load(at.grad + i);
      next = next + (kLearned ? learned_shift(row, sigma, g) : row.k_g * g);
    }
    if constexpr (kNoisy) next = next + sigma * load(at.z + i);
    store(at.x_next + i, next);
    if (at.kept) store(at.kept + i, kPlain ? x0 : kept(row, x, o, x0));
  }
}

template <bool kGuided, bool kLearned>
void steps(const ReverseStepParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const Row row = read_row(p, p.step[chunk.sample * p.step_stride]);
    const bool noisy = row.sigma != 0, has_grad = row.p_g != 0 || row.k_g != 0;
    if (noisy) sum_noises(p, row, chunk, buffers, wanted(kGuided ? p.out_uncond : p.x_next, chunk));

    Chunk second_half = chunk;
    second_half.first += p.elements;
    Operands at{};
    at.count = chunk.padded();
    at.x = staged(p.x, chunk, buffers.x);
    if (p.out.data) at.out = staged(p.out, chunk, buffers.out);
    if (kGuided) at.uncond = staged(p.out_uncond, chunk, buffers.uncond);
    if (kLearned) at.variance = staged(p.out, second_half, buffers.variance);
    if (has_grad) at.grad = staged(p.grad, chunk, buffers.grad);
    at.z = buffers.z.data;
    for (int h = 0; h < p.history_count; ++h)
      if (reads_slot(row, h)) {
        at.k[at.slots] = row.k_j[h];
        at.slot[at.slots++] = staged(p.history[h], chunk, buffers.history[h]);
      }
    at.x_next = target(p.x_next, chunk, buffers.x_next);
    if (p.kept.data) at.kept = target(p.kept, chunk, buffers.kept);

    if (noisy)
      row.plain ? update<kGuided, kLearned, true, true>(row, at) : update<kGuided, kLearned, true, false>(row, at);
    else
      row.plain ? update<kGuided, kLearned, false, true>(row, at) : update<kGuided, kLearned, false, false>(row, at);
    if (blends(row)) blend(p, row, chunk, buffers, at.x_next);
    commit(p.x_next, chunk, buffers.x_next);
    if (at.kept) commit(p.kept, chunk, buffers.kept);
  }
}

}  // namespace

void reverse_step(const ReverseStepParams& p, int64_t begin, int64_t end) {
  const bool is_guided = p.out_uncond.data != nullptr;
  if (is_guided && p.learned_variance) return steps<true, true>(p, begin, end);
  if (is_guided) return steps<true, false>(p, begin, end);
  if (p.learned_variance) return steps<false, true>(p, begin, end);
  steps<false, false>(p, begin, end);
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
