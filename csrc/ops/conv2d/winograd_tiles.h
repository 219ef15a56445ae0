// The tiles of a convolution by Winograd's algorithm (winograd.h): where they lie, what they depend on, and how their
// results get into y. For the kernels that take U ready made (cpu_winograd_fma.cpp) and that make it
// (cpu_winograd_taps_fma.cpp), whose bits are the same: an element of M is a sum of chains along the channels, cut every
// kWinogradChain of them. So it depends on neither the batch nor how the work is split.

#pragma once

#include "cpu/kernels.h"
#include "cpu/winograd.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kWinogradChain = 64;  // channels that are added up one by one: precision is dear here

struct Tiles {
  const ConvParams& p;
  const int64_t high = p.tiles_high(), wide = p.tiles_wide();

  struct Pixel {
    int64_t sample, y, x;
  };

  // The first output of a tile, of all samples' in a row.
  Pixel corner(int64_t tile) const {
    const int64_t row = tile / wide;
    return {row / high, row % high * kTile, tile % wide * kTile};
  }

  int64_t pixel(Pixel at) const { return (at.sample * p.out_height + at.y) * p.out_width + at.x; }

  // The pixels of x[source] that a tile depends on; those outside the image are `zeros`.
  void patch(Pixel at, int source, const float* zeros, const float** d) const {
    const int64_t width = p.channels[source];
    for (int64_t y = at.y - 1; y <= at.y + kTile; ++y) {
      const bool inside = y >= 0 && y < p.out_height;
      const float* row = static_cast<const float*>(p.x[source]) +
                         (at.sample * p.height + (y >> p.upsample)) * p.width * width;
      for (int64_t x = at.x - 1; x <= at.x + kTile; ++x)
        *d++ = inside && x >= 0 && x < p.out_width ? row + (x >> p.upsample) * width : zeros;
    }
  }

  // Prefetches `columns` channels of the pixels that a tile will be written to. GCC takes a function that only prefetches
  // for one without an effect, and would drop the call.
  __attribute__((always_inline)) void ask_for_outputs(Pixel at, int64_t column, int64_t columns) const {
    const float* y = static_cast<float*>(p.y) + pixel(at) * p.out_channels + column;
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j)
        for (int64_t k = 0; k < columns; k += 16)
          __builtin_prefetch(y + (i * p.out_width + j) * p.out_channels + k, 0, 2);
  }

  // Y = A^T M A, channels [first, end) of it, and what is added to it. Matrix (i, j) of M is at i m_row + j m_column.
  void transform_output(const float* from, int64_t m_row, int64_t m_column, Pixel at, int64_t first,
                        int64_t end) const {
    for (int64_t k = first; k < end; k += kLanes, from += kLanes) {
      const int count = int(min(kLanes, end - k));
      if (count == kLanes)
        transform_output<true>(from, m_row, m_column, at, k, count);
      else
        transform_output<false>(from, m_row, m_column, at, k, count);
    }
  }

 private:
  template <bool whole>
  void transform_output(const float* from, int64_t m_row, int64_t m_column, Pixel at, int64_t k, int count) const {
    const auto get = [&](const float* x) { return whole ? load(x) : load(x, count); };
    f32v columns[kTile][kSize], shift{};
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) {
      f32v m_j[kSize];
#pragma GCC unroll 6
      for (int i = 0; i < kSize; ++i) m_j[i] = load(from + i * m_row + j * m_column);
      Transform::output(m_j, &columns[0][j], kSize);
    }
    if (p.bias) shift = shift + get(p.bias + k);
    if (p.add) shift = shift + get(p.add + at.sample * p.add_stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      if (at.y + i >= p.out_height) break;
      f32v y_i[kTile];
      Transform::output(columns[i], y_i, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        if (at.x + j >= p.out_width) break;
        const int64_t to = (pixel(at) + i * p.out_width + j) * p.out_channels + k;
        f32v y = y_i[j] + shift;
        if (p.residual) y = y + get(static_cast<const float*>(p.residual) + to);
        whole ? store(static_cast<float*>(p.y) + to, y) : store(static_cast<float*>(p.y) + to, y, count);
      }
    }
  }
};

// Work items, each a Block of tiles that meets a block of columns; what is made of its inputs serves the items after it.
template <class Block>
DIFFKERN_FN void convolve(const ConvParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin, columns = p.winograd_columns(); item < end; ++item) {
    const Block block(p, item / columns);
    const int64_t column = item % columns;
    if (item == begin || column == 0) block.transform_inputs();
    block.multiply_by(column);
    block.transform_outputs(column);
  }
}

}  // namespace

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
