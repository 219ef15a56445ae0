// loss_n = weight_n mean (out - eps)^2 (Ho et al. 2020, eq. 14) with eps made again instead of stored.
// Forward: a sum for each chunk, then for each sample; in a fixed order, so that no split changes the bits.

#include "cpu/kernels.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

// Calls visit(position, out - eps) for each register of the chunk; 0 beyond its last element.
template <class Visit>
DIFFKERN_FN void for_each_error(const NoiseLossParams& p, const Chunk& chunk, Visit visit) {
  Buffer buffer, eps;
  i32v lane{};
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  const uint32_t t = uint32_t(p.t[chunk.sample * p.t_stride]);
  const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), t, kForwardNoising);
  normals(address, chunk.first, chunk.padded(), eps.data, wanted(p.out, chunk), wanted(p.grad_out, chunk));
  const float* out = staged(p.out, chunk, buffer);
  for (int i = 0; i < chunk.padded(); i += kLanes)
    visit(i, lane + i < chunk.count ? load(out + i) - load(eps.data + i) : f32v{});
}

}  // namespace

void noise_loss_partial(const NoiseLossParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    f32v sum{};
    for_each_error(p, chunk_of(item, p.elements), [&](int, f32v error) { sum = sum + error * error; });
    p.partial[item] = reduce_add(sum);
  }
}

void noise_loss_total(const NoiseLossParams& p, int64_t begin, int64_t end) {
  const int64_t per_sample = chunks(p.elements);
  for (int64_t n = begin; n < end; ++n) {
    double sum = 0;
    for (int64_t c = 0; c < per_sample; ++c) sum += p.partial[n * per_sample + c];
    p.loss[n] = float(sum / double(p.elements) * (p.weights ? p.weights[n] : 1.0f));
  }
}

void noise_loss_backward(const NoiseLossParams& p, int64_t begin, int64_t end) {
  Buffer buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const int64_t n = chunk.sample;
    const float slope = float(2.0 / double(p.elements) * (p.weights ? p.weights[n] : 1.0f) * p.grad_loss[n]);
    float* grad_out = target(p.grad_out, chunk, buffer);
    for_each_error(p, chunk, [&](int at, f32v error) { store(grad_out + at, slope * error); });
    commit(p.grad_out, chunk, buffer);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
