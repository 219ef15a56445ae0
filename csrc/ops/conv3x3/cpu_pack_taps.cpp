// A 3x3 convolution's weight as conv_winograd_taps and expand_taps read it: registers along the columns, which a weight
// has only turned.

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kDepth = PackTapsParams::kDepth;

// One tap of some channels and of a register of columns, `count` of which there are.
void pack(const PackTapsParams& p, int64_t tap, int64_t channel, int64_t depth, int64_t column, float* to) {
  const int count = int(min(kLanes, p.out_channels - column));
  alignas(64) float rows[kDepth * kLanes];
  if (!p.turned && count > 0)
    transpose(p.weight + (column * 9 + tap) * p.channels + channel, 9 * p.channels, count, depth, 1.0f, rows, kLanes);
  for (int64_t c = 0; c < depth; ++c, to += 9 * kTapColumns) {
    f32v value{};
    if (count > 0)
      value = p.turned ? load(p.weight + ((channel + c) * 9 + 8 - tap) * p.out_channels + column, count)
                       : load(rows + c * kLanes, count);
    store(to, value);
  }
}

}  // namespace

void pack_taps(const PackTapsParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / p.depths(), channel = item % p.depths() * kDepth;
    float* to = p.taps + (block * p.channels + channel) * 9 * kTapColumns;
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t k = 0; k < kTapColumns; k += kLanes)
        pack(p, tap, channel, min(kDepth, p.channels - channel), block * kTapColumns + k, to + tap * kTapColumns + k);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
