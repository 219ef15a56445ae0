// One step of a sampler (math/update.h) with its noise. A work item is a chunk of one sample: x and the network's
// output are read once and x_next is written once.

#include "math/update.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

struct Buffers {
  Buffer x, out, uncond, variance, x_next, x0, history[kMaxHistory], z;
};

template <bool kGuided, bool kLearned>
void steps(const ReverseStepParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  float* const z = buffers.z.data;
  const float limit = p.clip ? 1.0f : __builtin_inff();
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const float* columns = p.table + p.step[chunk.sample * p.step_stride] * p.columns;
    Row row;
    std::memcpy(&row, columns, sizeof row);
    const float* history_k = columns + kRowColumns;
    if (row.sigma != 0) {
      const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), uint32_t(row.t), kReverseStep);
      normals(address, chunk.first, chunk.padded(), z, wanted(p.x, chunk), wanted(p.out, chunk),
              wanted(kGuided ? p.out_uncond : p.x_next, chunk));
    }

    Chunk second_half = chunk;
    second_half.first += p.elements;
    const float* x = staged(p.x, chunk, buffers.x);
    const float* out = staged(p.out, chunk, buffers.out);
    const float* uncond = kGuided ? staged(p.out_uncond, chunk, buffers.uncond) : nullptr;
    const float* variance = kLearned ? staged(p.out, second_half, buffers.variance) : nullptr;
    const float* history[kMaxHistory];
    for (int h = 0; h < p.history_count; ++h) history[h] = staged(p.history[h], chunk, buffers.history[h]);
    float* x_next = target(p.x_next, chunk, buffers.x_next);
    float* x0_hat = p.x0_hat.data ? target(p.x0_hat, chunk, buffers.x0) : buffers.x0.data;

    const auto update = [&]<bool kNoisy>() __attribute__((always_inline)) {
      for (int i = 0; i < chunk.padded(); i += kLanes) {
        const f32v x_t = load(x + i);
        f32v o = load(out + i);
        if constexpr (kGuided) o = guided(p.guidance, o, load(uncond + i));
        const f32v x0 = predicted_x0(row, x_t, o, limit);
        f32v next = next_mean(row, x_t, o, x0);
        for (int h = 0; h < p.history_count; ++h) next = next + history_k[h] * load(history[h] + i);
        if constexpr (kNoisy && kLearned) next = next + learned_sigma(row, load(variance + i)) * load(z + i);
        if constexpr (kNoisy && !kLearned) next = next + row.sigma * load(z + i);
        store(x_next + i, next);
        if (p.x0_hat.data) store(x0_hat + i, x0);
      }
    };
    if (row.sigma != 0)
      update.template operator()<true>();
    else
      update.template operator()<false>();
    commit(p.x_next, chunk, buffers.x_next);
    if (p.x0_hat.data) commit(p.x0_hat, chunk, buffers.x0);
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
