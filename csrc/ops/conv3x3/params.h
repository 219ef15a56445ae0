// The parameters of conv3x3's kernels beside its convolutions (ops/conv2d/params.h). CPU only.

#pragma once

#include <cstdint>

#include "integers.h"
#include "ops/conv2d/params.h"

namespace diffkern {

// A 3x3 convolution's weight as conv_winograd_taps takes it; or turned, that of the input gradient: each channel's kernel
// by 180 degrees, and channels for output channels.
struct PackTapsParams {
  const float* weight;  // [K, 3, 3, C], or turned [C, 3, 3, K]
  float* taps;          // [column_blocks, C, 9, kTapColumns], zeros behind K
  int64_t channels, out_channels;  // C, K
  bool turned;

  int64_t column_blocks() const { return divide_up(out_channels, kTapColumns); }
  int64_t elements() const { return column_blocks() * channels * 9 * kTapColumns; }

  // Work items: a block of columns and some channels.
  static constexpr int64_t kDepth = 16;
  int64_t depths() const { return divide_up(channels, kDepth); }
  int64_t items() const { return column_blocks() * depths(); }
};

// The weight gradient of a 3x3 convolution of stride 1 and padding 1, float32 in channels_last memory.
struct Conv3x3GradientParams {
  const float* x;       // [N, H, W, C]
  const float* grad_y;  // [N, H, W, K]
  float* parts;         // [parts, K, 3, 3, C], each over its own tiles. One part alone is the gradient
  float* grad_weight;   // [K, 3, 3, C]
  int64_t samples, height, width, channels, out_channels;  // N, H, W, C, K
  int64_t part_count;                                      // enough_parts()

  int64_t tiles_high() const { return divide_up(height, 4); }
  int64_t tiles_wide() const { return divide_up(width, 4); }
  int64_t tiles() const { return samples * tiles_high() * tiles_wide(); }

  // Work items: a block of output channels, one of channels, and a part of the tiles.
  static constexpr int64_t kTiles = 32, kChannels = 64;  // of a block
  int64_t channel_blocks() const { return divide_up(channels, kChannels); }
  int64_t blocks() const { return divide_up(out_channels, kChannels) * channel_blocks(); }

  // As many parts as give several threads an item, and each item a few blocks of tiles.
  int64_t enough_parts() const {
    const int64_t wanted = divide_up(8, blocks()), most = tiles() / (2 * kTiles);
    return most < 1 ? 1 : wanted < most ? wanted : most;
  }
};

}  // namespace diffkern
