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

// The history's slots that a row reads.
struct Slots {
  int count = 0;
  float k[kMaxHistory];
  const float* data[kMaxHistory];
};

// z = the sum of the row's noises. What is wanted afterwards comes with the first.
DIFFKERN_FN void sum_noises(const ReverseStepParams& p, const Row& row, const Chunk& chunk, Buffers& buffers,
                            const Wanted& uncond) {
  const uint64_t seed = uint64_t(p.seeds[chunk.sample]);
  normals(NoiseAddress(seed, uint32_t(row.address), kReverseStep), chunk.first, chunk.padded(), buffers.z.data,
          wanted(p.x, chunk), wanted(p.out, chunk), uncond);
  for (int64_t i = 1; i < row.count; ++i) {
    const NoiseAddress address(seed, uint32_t(row.address - i), kReverseStep);
    normals(address, chunk.first, chunk.padded(), buffers.term.data);
    for (int e = 0; e < chunk.padded(); e += kLanes)
      store(buffers.z.data + e, load(buffers.z.data + e) + load(buffers.term.data + e));
  }
}

void blend(const ReverseStepParams& p, const Row& row, const Chunk& chunk, Buffers& buffers, float* x_next) {
  const float* z = buffers.z.data;
  if (row.b_z != 0) {
    const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), uint32_t(row.address), kKnown);
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

template <bool kGuided, bool kLearned>
void steps(const ReverseStepParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  const float* const z = buffers.z.data;
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const Row row = read_row(p, p.step[chunk.sample * p.step_stride]);
    if (row.sigma != 0) sum_noises(p, row, chunk, buffers, wanted(kGuided ? p.out_uncond : p.x_next, chunk));

    Chunk second_half = chunk;
    second_half.first += p.elements;
    const bool has_out = p.out.data, has_grad = row.p_g != 0 || row.k_g != 0, has_kept = p.kept.data;
    const float* x = staged(p.x, chunk, buffers.x);
    const float* out = has_out ? staged(p.out, chunk, buffers.out) : nullptr;
    const float* uncond = kGuided ? staged(p.out_uncond, chunk, buffers.uncond) : nullptr;
    const float* variance = kLearned ? staged(p.out, second_half, buffers.variance) : nullptr;
    const float* grad = has_grad ? staged(p.grad, chunk, buffers.grad) : nullptr;
    Slots slots;
    for (int h = 0; h < p.history_count; ++h)
      if (reads_slot(row, h)) {
        slots.k[slots.count] = row.k_j[h];
        slots.data[slots.count++] = staged(p.history[h], chunk, buffers.history[h]);
      }
    float* x_next = target(p.x_next, chunk, buffers.x_next);
    float* to_keep = has_kept ? target(p.kept, chunk, buffers.kept) : nullptr;

    // kMore: what rows of few steps have. The others' loop is short, and has no branches for it.
    const auto update = [&]<bool kNoisy, bool kMore>() __attribute__((always_inline)) {
      for (int i = 0; i < chunk.padded(); i += kLanes) {
        const f32v x_t = load(x + i);
        f32v o = kMore && !has_out ? f32v{} : load(out + i);
        if constexpr (kGuided) o = guided(row.w, o, load(uncond + i));
        f32v x0 = predicted_x0(row, x_t, o);
        if (kMore && row.p_g != 0) x0 = x0 + row.p_g * load(grad + i);
        x0 = clamped(x0, row.limit);
        f32v next = next_mean(row, x_t, o, x0);
        for (int s = 0; s < slots.count; ++s) next = next + slots.k[s] * load(slots.data[s] + i);
        if constexpr (kGuided && kMore)
          if (row.k_u != 0) next = next + row.k_u * load(uncond + i);
        f32v sigma;
        if constexpr (kNoisy && kLearned) sigma = learned_sigma(row, load(variance + i));
        if (kMore && row.k_g != 0) {
          const f32v g = load(grad + i);
          if constexpr (kNoisy && kLearned)
            next = next + learned_shift(row, sigma, g);
          else
            next = next + row.k_g * g;
        }
        if constexpr (kNoisy && kLearned) next = next + sigma * load(z + i);
        if constexpr (kNoisy && !kLearned) next = next + row.sigma * load(z + i);
        store(x_next + i, next);
        if (has_kept) store(to_keep + i, kMore ? kept(row, x_t, o, x0) : x0);
      }
    };
    const bool more = !has_out || has_grad || row.k_u != 0 || row.q_x != 0 || row.q_o != 0 || row.q_0 != 1;
    if (row.sigma != 0)
      more ? update.template operator()<true, true>() : update.template operator()<true, false>();
    else
      more ? update.template operator()<false, true>() : update.template operator()<false, false>();
    if (blends(row)) blend(p, row, chunk, buffers, x_next);
    commit(p.x_next, chunk, buffers.x_next);
    if (has_kept) commit(p.kept, chunk, buffers.kept);
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
