// Sums of a, b, a^2, a b and b^2 of each sample: of each chunk in float32 lanes, then of the chunks in double, in a
// fixed order, so that no split changes the bits.

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

struct Buffers {
  Buffer a, b;
};

}  // namespace

void moments_partial(const MomentsParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const float* a = staged(p.a, chunk, buffers.a);
    const float* b = staged(p.b, chunk, buffers.b);
    f32v sums[kMoments] = {};
    for (int i = 0; i < chunk.padded(); i += kLanes) {
      const f32v x = load(a + i), y = load(b + i);
      sums[0] += x, sums[1] += y, sums[2] += x * x, sums[3] += x * y, sums[4] += y * y;
    }
    for (int m = 0; m < kMoments; ++m) p.partial[item * kMoments + m] = reduce_add(sums[m]);
  }
}

void moments_total(const MomentsParams& p, int64_t begin, int64_t end) {
  const int64_t per_sample = chunks(p.elements);
  for (int64_t n = begin; n < end; ++n)
    for (int m = 0; m < kMoments; ++m) {
      double sum = 0;
      for (int64_t c = 0; c < per_sample; ++c) sum += p.partial[(n * per_sample + c) * kMoments + m];
      p.moments[n * kMoments + m] = sum;
    }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
