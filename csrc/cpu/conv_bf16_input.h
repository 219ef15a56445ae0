// What the products of conv_bf16 read: 16 pixels by 32 channels as a tap of the kernel sees them, evenly apart.
//
// Either x itself has them so, or what a block's taps see is copied.

#pragma once

#include "gemm_bf16.h"

namespace diffkern {

constexpr int64_t kMaxTaps = 16;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A block of pixels of y, or of one in four where it is upsampled; and panels of its channels.
struct Block {
  int64_t sample, samples, row, rows, column, columns;
  int64_t panel, panels;
};

// Fills in how far each tap sees, at(row, column) of the kernel; for an upsampling one quarter by quarter.
template <class At>
static void find_taps(const ConvParams& p, int64_t* tap, At at) {
  const int64_t side = p.quarters() == 4 ? 2 : p.side(), apart = p.side() - side;
  for (int64_t i = 0; i <= apart; ++i)
    for (int64_t j = 0; j <= apart; ++j)
      for (int64_t u = 0; u < side; ++u)
        for (int64_t v = 0; v < side; ++v) *tap++ = at(i + u, j + v);
}

// Where a source of x has its pixels, in elements.
struct Source {
  int64_t border, pixel, row, block, sample;  // block: from kDepth channels to the next

  Source(const ConvParams& p, int source) {
    border = p.blocked ? 1 : 0;
    pixel = p.blocked ? kDepth : p.channels[source];
    row = (p.width + 2 * border) * pixel;
    const int64_t image = (p.height + 2 * border) * row;
    block = p.blocked ? image : kDepth;
    sample = p.blocked ? p.depth_blocks() * image : image;
  }
  int64_t at(int64_t n, int64_t h, int64_t w) const { return n * sample + (h + border) * row + (w + border) * pixel; }
};

// [blocks of channels, samples, row phases, column phases, rows, columns, kDepth]. Row r of phase i is row
// (block.row + r) stride + i - padding of the image, and columns are likewise. What tap (u, v) sees from a pixel of y
// is in phase u % phases, u / phases rows on: as far away for every pixel.
// With a phase for each column of the kernel the copy is as wide as y. Rows then lie on end without a gap, and narrow
// images can be cut into tiles that go on from a row to the next.
struct Copy {
  int64_t row_phases, column_phases, rows, columns;
  int64_t size;           // of a block of channels
  int64_t tap[kMaxTaps];  // how far it sees

  Copy(const ConvParams& p, const ConvBlocks& blocks, const Block& block) {
    row_phases = min(p.stride, p.side());
    column_phases = blocks.flat ? p.side() : row_phases;
    rows = block.rows + (p.side() - 1) / row_phases;
    columns = block.columns + (p.side() - 1) / column_phases;
    find_taps(p, tap, [&](int64_t u, int64_t v) {
      const int64_t phase = u % row_phases * column_phases + v % column_phases;
      return ((phase * rows + u / row_phases) * columns + v / column_phases) * kDepth;
    });
    size = (block.samples * sample() / kDepth | 1) * kDepth;  // odd, or all blocks would meet in the same cache sets
  }
  int64_t sample() const { return row_phases * column_phases * rows * columns * kDepth; }
};

DIFFKERN_FN void convert(const BFloat16* from, int64_t count, BFloat16* to) {
  std::memcpy(to, from, count * sizeof *to);
}

DIFFKERN_FN void convert(const float* from, int64_t count, BFloat16* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(from + c));
  if (c < count) store(to + c, load(from + c, int(count - c)), int(count - c));
}

// What the block sees of `count` neighbouring channels of a source.
template <class T>
static void copy_channels(const ConvParams& p, const Block& block, const Copy& copy, const T* x, const Source& source,
                          int64_t count, BFloat16* to) {
  const int doubled = p.upsample && p.quarters() == 1;
  const int64_t height = p.height << doubled, width = p.width << doubled;
  for (int64_t n = block.sample; n < block.sample + block.samples; ++n)
    for (int64_t phase = 0; phase < copy.row_phases * copy.column_phases; ++phase)
      for (int64_t r = 0; r < copy.rows; ++r) {
        const int64_t h = (block.row + r) * p.stride + phase / copy.column_phases - p.padding;
        const T* const row = x + source.at(n, h >> doubled, 0);
        for (int64_t c = 0; c < copy.columns; ++c, to += kDepth) {
          const int64_t w = (block.column + c) * p.stride + phase % copy.column_phases - p.padding;
          if (0 > h || h >= height || 0 > w || w >= width)
            std::memset(to, 0, count * sizeof *to);
          else if (count == kDepth)
            convert(row + (w >> doubled) * source.pixel, kDepth, to);  // of a size that the compiler knows
          else
            convert(row + (w >> doubled) * source.pixel, count, to);
        }
      }
}

// Channels [first, last) of what the block sees.
template <class T>
static void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  const int64_t back = (last - first - 1) / kDepth * copy.size;          // the last block
  if (last % kDepth) std::memset(to + back, 0, copy.size * sizeof *to);  // behind the last channel too
  for (int64_t c = first, count; c < last; c += count) {
    const int part = c >= p.channels[0];
    const Source source(p, part);
    const int64_t own = part ? c - p.channels[0] : c;
    count = min(min(last - c, p.channels[part] - own), kDepth - max(c % kDepth, own % kDepth));
    copy_channels(p, block, copy, static_cast<const T*>(p.x[part]) + own / kDepth * source.block + own % kDepth, source,
                  count, to + (c - first) / kDepth * copy.size + c % kDepth);
  }
}

static void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  if (p.x_dtype == DType::bf16)
    fill<BFloat16>(p, block, copy, first, last, to);
  else
    fill<float>(p, block, copy, first, last, to);
}

}  // namespace diffkern
