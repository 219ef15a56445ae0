// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4). A work item is a chunk of one sample.

#include "cpu/kernels.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

void q_sample(const QSampleParams& p, int64_t begin, int64_t end) {
  Buffer x_0_buffer, x_t_buffer, eps_buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const int64_t t = p.t[chunk.sample * p.t_stride];
    const int64_t word = p.address ? p.address[chunk.sample * p.address_stride] : t;
    const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), uint32_t(word), kForwardNoising);
    const float a = p.table[2 * t], s = p.table[2 * t + 1];

    float* eps = p.eps.data ? target(p.eps, chunk, eps_buffer) : eps_buffer.data;
    normals(address, chunk.first, chunk.padded(), eps, wanted(p.x_0, chunk), wanted(p.x_t, chunk));
    const float* x_0 = staged(p.x_0, chunk, x_0_buffer);
    float* x_t = target(p.x_t, chunk, x_t_buffer);
    for (int i = 0; i < chunk.padded(); i += kLanes) store(x_t + i, a * load(x_0 + i) + s * load(eps + i));
    commit(p.x_t, chunk, x_t_buffer);
    if (p.eps.data) commit(p.eps, chunk, eps_buffer);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
