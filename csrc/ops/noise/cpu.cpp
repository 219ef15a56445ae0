// z = the noise of (seed, step, stream). A work item is a chunk of one sample.

#include "cpu/kernels.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

void noise(const NoiseParams& p, int64_t begin, int64_t end) {
  Buffer buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const NoiseAddress address(uint64_t(p.seeds[chunk.sample]), uint32_t(p.step[chunk.sample * p.step_stride]), p.stream);
    float* z = target(p.z, chunk, buffer);
    normals(address, chunk.first, chunk.padded(), z);
    commit(p.z, chunk, buffer);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
