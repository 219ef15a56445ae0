// The operands of conv_bf16's products: 16 pixels by 32 channels as a tap of the kernel sees them, evenly apart.
//
// Either x itself has them so, or what a block's taps see is copied.

#pragma once

#include "cpu/gemm_bf16.h"
#include "params.h"

namespace diffkern {

constexpr int64_t kMaxTaps = 16;

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

// The strides of a source of x, in elements.
struct Source {
  int64_t border, pixel, row, term, block, sample;  // block: from kDepth channels to the next

  Source(const ConvParams& p, int source) {
    border = p.blocked ? 1 : 0;
    pixel = p.blocked ? kDepth : p.channels[source];
    row = (p.width + 2 * border) * pixel;
    term = (p.height + 2 * border) * row;
    block = p.blocked ? p.terms * term : kDepth;
    sample = p.blocked ? p.depth_blocks() * block : term;
  }
  int64_t at(int64_t n, int64_t h, int64_t w) const { return n * sample + (h + border) * row + (w + border) * pixel; }
};

// [blocks of channels, terms, samples, row phases, column phases, rows, columns, kDepth]. Row r of phase i is row
// (block.row + r) stride + i - padding of the image, and columns are likewise. What tap (u, v) sees from a pixel of y
// is in phase u % phases, u / phases rows on: as far away for every pixel.
// With a phase for each column of the kernel the copy is as wide as y. Rows then lie on end without a gap, and narrow
// images can be cut into tiles that go on from a row to the next.
struct Copy {
  int64_t row_phases, column_phases, rows, columns;
  int64_t size;           // of a term of a block of channels
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

// The terms of `count` channels of a pixel. Terms are `apart` from each other, and `from_apart` in a blocked image.
template <int terms>
DIFFKERN_FN void convert(const BFloat16* from, int64_t from_apart, int64_t count, BFloat16* to, int64_t apart) {
  for (int i = 0; i < terms; ++i) std::memcpy(to + i * apart, from + i * from_apart, count * sizeof *to);
}

template <int terms>
DIFFKERN_FN void convert(const float* from, int64_t, int64_t count, BFloat16* to, int64_t apart) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store_terms<terms>(to + c, apart, load(from + c));
  if (c == count) return;
  BFloat16 rest[terms][kLanes];
  store_terms<terms>(rest[0], kLanes, load(from + c, int(count - c)));
  for (int i = 0; i < terms; ++i) std::memcpy(to + c + i * apart, rest[i], (count - c) * sizeof *to);
}

// Copies the pixels of `count` neighbouring channels of a source that the block reads.
template <class T, int terms>
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
          const T* const pixel = row + (w >> doubled) * source.pixel;
          if (0 > h || h >= height || 0 > w || w >= width)
            for (int i = 0; i < terms; ++i) std::memset(to + i * copy.size, 0, count * sizeof *to);
          else if (count == kDepth)
            convert<terms>(pixel, source.term, kDepth, to, copy.size);  // of a size that the compiler knows
          else
            convert<terms>(pixel, source.term, count, to, copy.size);
          if (!p.blocked)  // of which pixels lie too far apart to be guessed; the next block's
            for (int64_t i = 0; i < kDepth * int64_t(sizeof(T)); i += 64)
              __builtin_prefetch((const char*)(pixel + kDepth) + i);
        }
      }
}

// Channels [first, last) of what the block sees.
template <class T, int terms>
static void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  const int64_t apart = terms * copy.size, back = (last - first - 1) / kDepth * apart;  // back: the last block
  if (last % kDepth) std::memset(to + back, 0, apart * sizeof *to);                     // behind the last channel too
  for (int64_t c = first, count; c < last; c += count) {
    const int part = c >= p.channels[0];
    const Source source(p, part);
    const int64_t own = part ? c - p.channels[0] : c;
    count = min(min(last - c, p.channels[part] - own), kDepth - max(c % kDepth, own % kDepth));
    const T* const x = static_cast<const T*>(p.x[part]) + own / kDepth * source.block + own % kDepth;
    copy_channels<T, terms>(p, block, copy, x, source, count, to + (c - first) / kDepth * apart + c % kDepth);
  }
}

template <int terms>
static void fill(const ConvParams& p, const Block& block, const Copy& copy, int64_t first, int64_t last, BFloat16* to) {
  if (p.x_dtype == DType::bf16)
    fill<BFloat16, terms>(p, block, copy, first, last, to);
  else
    fill<float, terms>(p, block, copy, first, last, to);
}

}  // namespace diffkern
