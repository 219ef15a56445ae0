// Hashes of the radius and of the angle over runs of codes: sums, so that no order changes them.

#include "cpu/kernels.h"
#include "math/normal.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

void word_hash(const WordHashParams& p, int64_t begin, int64_t end) {
  u32v lane{};
  for (int l = 0; l < kLanes; ++l) lane[l] = uint32_t(l);
  for (int64_t item = begin; item < end; ++item) {
    u32v low{}, high{};
    auto add = [&](u32v code, f32v value) __attribute__((always_inline)) {
      const u32v bits = (u32v)as_int(value);
      low += bits * (2u * code + 1u);
      high += (bits ^ (code * 0x9E3779B9u)) * 0x85EBCA6Bu ^ bits >> 15;
    };
    for (int64_t i = 0; i < kCodesPerHash; i += kLanes) {
      const u32v code = lane + uint32_t(item * kCodesPerHash + i);
      if (p.angle) {
        const CosSin<f32v> phase = cos_sin<f32v>(code);
        add(code, phase.cos);
        add(code * 0x9E3779B1u, phase.sin);
      } else {
        add(code, radius<f32v>(code));
      }
    }
    uint32_t low_sum = 0, high_sum = 0;
    for (int l = 0; l < kLanes; ++l) low_sum += low[l], high_sum += high[l];
    p.hash[item] = uint64_t(high_sum) << 32 | low_sum;
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
