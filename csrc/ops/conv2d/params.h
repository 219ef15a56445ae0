// The parameters of the convolutions that conv2d and conv3x3 run, and how these are cut into work items. CPU only.

#pragma once

#include <cstdint>

#include "cpu/layout_bf16.h"
#include "dtype.h"
#include "integers.h"

namespace diffkern {

constexpr int64_t kDirectColumns = 64, kDirectPixels = 96;  // conv_direct's blocks: of the weight's columns, of pixels
constexpr int64_t kFewColumns = 4;                          // so many or fewer are packed one a block
constexpr int64_t kWinogradColumns = 64, kWinogradTiles = 30;  // conv_winograd's: of the weight's columns, of tiles
constexpr int64_t kTapColumns = 32, kTapTiles = 32;            // conv_winograd_taps's
constexpr int64_t kTapDepth = 16;                              // and its channels at a time
constexpr int64_t kBlockTiles = 8;  // conv_bf16's: tiles of a block,
constexpr int64_t kMaxPanels = 8;   // and panels that a copy serves at most

// y = conv(x) + bias + add + residual. Everything is channels_last: the channels of a pixel together.
// Pixels outside the image are 0. The weight says by its number of matrices how it is to be used: 36 are Winograd's
// F(4x4, 3x3), 9 and 1 are the taps of a 3x3 and of a 1x1 kernel, and 4 an upsampling kernel's (quarters, below).
// x, residual and y are float32, or with a weight of one term of bfloat16 either dtype; bias and add are float32.
struct ConvParams {
  const void* x[2];  // [N, H, W, channels[0]], [N, H, W, channels[1]]: one after the other; the second may be null
  int64_t channels[2];
  const void* weight;    // [matrices, column blocks, channels, column block], or conv_bf16's
  const float* bias;     // [K] or null
  const float* add;      // [N, K] or null, a sample apart by add_stride
  const void* residual;  // [N, H', W', K] or null
  void* y;               // [N, H', W', K]
  DType x_dtype, y_dtype;
  int64_t samples, height, width, out_height, out_width, out_channels;
  int64_t matrices, stride, padding, add_stride;  // padding: rows above and columns to the left
  bool upsample;  // each pixel of x is four, 2x2, of the image that is convolved
  bool taps;      // the weight is [column blocks, channels, 9, column block], of which Winograd's 36 matrices are made
  bool blocked;   // x is, and there is no second source
  int terms;      // of bfloat16, of an element of the weight and of x; 0 where products are of float32

  int64_t depth() const { return channels[0] + channels[1]; }
  int64_t pixels() const { return samples * out_height * out_width; }

  // conv_direct's work items: a block of pixels, of all samples in a row, and a block of columns. Small maps are cut
  // finer, to be enough for several threads.
  bool few_columns() const { return out_channels <= kFewColumns; }
  int64_t direct_columns() const { return divide_up(out_channels, kDirectColumns); }
  int64_t direct_pixels() const {
    const int64_t share = divide_up(pixels() * direct_columns(), 8), fine = share < 24 ? 24 : share;
    const int64_t most = fine < kDirectPixels ? fine : kDirectPixels, blocks = divide_up(pixels(), most);
    return divide_up(divide_up(pixels(), blocks), 6) * 6;  // as even as they come, in whole tiles of 6 pixels
  }
  int64_t direct_items() const { return divide_up(pixels(), direct_pixels()) * direct_columns(); }

  // conv_winograd's and conv_winograd_taps's work items: a block of tiles, of all samples in a row and as even as they
  // come, and a block of columns. If that makes less than four, the tiles are cut finer, as long as a block has eight.
  bool winograd() const { return matrices == 36; }
  int64_t tiles_high() const { return divide_up(out_height, 4); }  // a tile has 4 x 4 outputs
  int64_t tiles_wide() const { return divide_up(out_width, 4); }
  int64_t tiles() const { return samples * tiles_high() * tiles_wide(); }
  int64_t winograd_column() const { return taps ? kTapColumns : kWinogradColumns; }  // a block
  int64_t winograd_columns() const { return divide_up(out_channels, winograd_column()); }
  int64_t winograd_blocks() const {
    const int64_t enough = divide_up(4, winograd_columns()), most = tiles() / 8;
    const int64_t fine = enough < most ? enough : most, size = taps ? kTapTiles : kWinogradTiles;
    const int64_t coarse = divide_up(tiles(), size);
    return fine > coarse ? fine : coarse;
  }
  int64_t winograd_tiles() const { return divide_up(tiles(), winograd_blocks()); }
  int64_t winograd_items() const { return winograd_blocks() * winograd_columns(); }

  // conv_bf16's view of it. Four matrices are an upsampling 3x3 kernel, in quarters of 2x2 taps: for each parity of a
  // pixel's row and column.
  int64_t quarters() const { return matrices == 4 ? 4 : 1; }
  int64_t side() const { return matrices == 1 ? 1 : 3; }
  int64_t grid_height() const { return matrices == 4 ? height : out_height; }
  int64_t grid_width() const { return matrices == 4 ? width : out_width; }
  int64_t column_panels() const { return divide_up(out_channels, kPanel); }
  int64_t panels() const { return quarters() * column_panels(); }
  int64_t depth_blocks() const { return divide_up(depth(), kDepthBlock); }
};

// A weight as conv_winograd takes it, made of one for conv_winograd_taps.
struct ExpandTapsParams {
  const float* taps;  // [tap_blocks, C, 9, kTapColumns]
  float* matrices;    // [36, column_blocks, C, kWinogradColumns]; what is beyond the taps' columns is left alone
  int64_t channels, tap_blocks, column_blocks;

  int64_t depths() const { return divide_up(channels, kTapDepth); }
  int64_t items() const { return tap_blocks * depths(); }
};

// conv_bf16's work items: a block of pixels, of one image or of several small ones, and some panels of columns, whose
// weights stay in the L2 cache. Small maps leave few blocks, which are then given fewer panels, for several threads.
struct ConvBlocks {
  bool flat;                       // rows are no whole tiles: a tile goes on in the next one
  bool in_place;                   // every tile that a tap sees lies in x, its rows evenly apart
  int64_t columns, rows, samples;  // of a block
  int64_t across, down, along;     // blocks in a row of an image, in a column of it, in the batch
  int64_t panels, groups;          // of an item; so many groups of them

  explicit ConvBlocks(const ConvParams& p) {
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    constexpr int64_t most = kBlockTiles * kTilePixels, cached = 1280 * 1024;
    const int64_t height = p.grid_height(), width = p.grid_width(), border = p.blocked ? 1 : 0;
    const auto inside = [&](int64_t size, int64_t out_size) {
      return p.padding <= border && (out_size - 1) * p.stride + p.side() - p.padding <= size + border;
    };
    const bool whole_blocks = p.blocked || (p.channels[0] % kDepthBlock == 0 && p.channels[1] % kDepthBlock == 0);
    in_place = p.x_dtype == DType::bf16 && (!p.upsample || p.quarters() == 4) && whole_blocks &&
               width % kTilePixels == 0 && inside(p.height, height) && inside(p.width, width);
    flat = width % kTilePixels != 0 && width < most / 2;
    columns = least(width, height == 1 ? most : most / 2);
    rows = least(height, most / columns);
    const bool whole = columns == width && rows == height;
    const int64_t tiles = flat ? divide_up(rows * columns, kTilePixels) : rows * divide_up(columns, kTilePixels);
    samples = whole ? least(p.samples, kBlockTiles / tiles) : 1;
    across = divide_up(width, columns);
    down = divide_up(height, rows);
    along = divide_up(p.samples, samples);
    const int64_t fit = divide_up(cached, p.matrices * p.depth_blocks() * kDepthBlock * kPanel * p.terms * 2);
    panels = divide_up(p.panels(), divide_up(p.panels(), fit));
    while (panels > 1 && places() * divide_up(p.panels(), panels) < 4) panels = divide_up(panels, 2);
    groups = divide_up(p.panels(), panels);
  }
  int64_t places() const { return across * down * along; }
  int64_t items() const { return places() * groups; }
};

}  // namespace diffkern
