// How group_norm_silu and its gradient walk over images, and the coefficients of channels.
//
// A work item is a block of whole groups of one sample. Both layouts are walked as tiles: rows of up to four registers,
// a constant stride apart. In channels_last memory a row is one pixel and its lanes are neighbouring channels; in
// contiguous memory rows and lanes alike are pixels of one channel.
// The order of every sum depends on the shape alone: neither the batch nor the threads change the bits.

#pragma once

#include "cpu/kernels.h"
#include "lanes/half.h"
#include "math/group_norm.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

// Visitors of tiles are called from several places. One copy of each is enough, and compiles in a third of the time.
#define DIFFKERN_ONCE __attribute__((noinline))

// --- the walk --------------------------------------------------------------------------------------------------------

constexpr int kWidth = 4 * kLanes;  // elements of a row, at most
constexpr int64_t kRun = 128;       // rows that are summed in float, before their sum goes on in double

struct Block {
  int64_t sample, first_group, groups, width;  // width: channels a group

  int64_t group_of(int64_t channel) const { return uint32_t(channel) / uint32_t(width) - first_group; }
};

Block block_of(const GroupNormSiluParams& p, int64_t item) {
  const int64_t groups = p.groups_per_block(), first = item % p.blocks() * groups, rest = p.groups - first;
  return {item / p.blocks(), first, groups < rest ? groups : rest, p.channels / p.groups};
}

struct Tile {
  int64_t offset, rows, stride;  // in elements
  int64_t channel;               // of the first lane
  const void* source;            // where x is read: x itself, or skip
  int64_t source_offset, source_stride;

  template <class T>
  const T* x() const {
    return static_cast<const T*>(source) + source_offset;
  }
};

// How a row is read and written: n whole registers, or the first lanes of one.
template <int n>
struct Whole {
  static constexpr int registers = n, lanes = n * kLanes;
  template <class T>
  f32v get(const T* p) const {
    return load(p);
  }
  template <class T>
  void put(T* p, f32v a) const {
    store(p, a);
  }
  f32v keep(f32v a) const { return a; }
};

struct Part {
  static constexpr int registers = 1;
  int lanes;

  template <class T>
  f32v get(const T* p) const {
    T row[kLanes] = {};
    std::memcpy(row, p, lanes * sizeof(T));
    return load(row);
  }
  template <class T>
  void put(T* p, f32v a) const {
    T row[kLanes];
    store(row, a);
    std::memcpy(p, row, lanes * sizeof(T));
  }
  f32v keep(f32v a) const {  // 0 in the other lanes
    for (int l = lanes; l < kLanes; ++l) a[l] = 0;
    return a;
  }
};

// Cuts rows of `width` elements into tiles.
template <class Visit>
DIFFKERN_FN void cut(Tile tile, int64_t width, bool across_channels, Visit visit) {
  auto visit_next = [&](auto row) {
    visit(tile, row);
    tile.offset += row.lanes;
    tile.source_offset += row.lanes;
    tile.channel += across_channels ? row.lanes : 0;
    width -= row.lanes;
  };
  while (width >= kWidth) visit_next(Whole<4>{});
  if (width >= 2 * kLanes) visit_next(Whole<2>{});
  if (width >= kLanes) visit_next(Whole<1>{});
  if (width > 0) visit_next(Part{int(width)});
}

template <class Visit>
DIFFKERN_FN void for_each_tile(const GroupNormSiluParams& p, const Block& block, Visit visit) {
  const int64_t first = block.first_group * block.width, end = first + block.groups * block.width;
  const int64_t sample = block.sample * p.channels * p.pixels;
  if (p.channels_last) {
    const auto cut_source = [&](const void* source, int64_t of_all, int64_t of_source, int64_t begin, int64_t end) {
      const int64_t offset = block.sample * of_source * p.pixels + begin - of_all;  // its channels begin at of_all
      if (begin < end)
        cut({sample + begin, p.pixels, p.channels, begin, source, offset, of_source}, end - begin, true, visit);
    };
    const int64_t own = p.channels - p.skip_channels;
    cut_source(p.x, 0, own, first, end < own ? end : own);
    cut_source(p.skip, own, p.skip_channels, first > own ? first : own, end);
    return;
  }
  const int64_t rows = p.pixels / kWidth;
  for (int64_t c = first; c < end; ++c) {
    const int64_t offset = sample + c * p.pixels, rest = offset + rows * kWidth;
    if (rows > 0) visit(Tile{offset, rows, kWidth, c, p.x, offset, kWidth}, Whole<4>{});
    cut({rest, 1, 0, c, p.x, rest, 0}, p.pixels % kWidth, false, visit);
  }
}

// Calls visit(group, begin, end) for all runs of lanes of the tile that are channels of one group.
template <class Visit>
DIFFKERN_FN void for_each_group(const Block& block, const Tile& tile, int64_t lanes, Visit visit) {
  int64_t group = block.group_of(tile.channel), end = (block.first_group + group + 1) * block.width - tile.channel;
  for (int64_t begin = 0; begin < lanes; begin = end, end += block.width, ++group)
    visit(group, begin, end < lanes ? end : lanes);
}

// --- sums ------------------------------------------------------------------------------------------------------------

template <int registers>
struct Sums {
  f32v first[registers], second[registers];
};

template <int n>
DIFFKERN_FN float total(const f32v (&a)[n]) {
  f32v sum = a[0];
  for (int v = 1; v < n; ++v) sum = sum + a[v];
  return reduce_add(sum);
}

// --- coefficients ----------------------------------------------------------------------------------------------------

DIFFKERN_FN double added(const GroupNormSiluParams& p, int64_t sample, int64_t channel) {
  return p.add ? p.add[sample * p.channels + channel] : 0.0;
}

template <int k>
struct Coefficients {
  float of[k];
};

// The statistics of the groups of a block.
struct Statistics {
  double mean[kMaxGroupsPerBlock], rstd[kMaxGroupsPerBlock];
};

// center, slope and offset (math/group_norm.h).
struct AffineOf {
  const GroupNormSiluParams& p;
  int64_t sample;
  const Statistics& statistics;

  Coefficients<3> operator()(int64_t channel, int64_t group) const {
    double weight = p.weight[channel], bias = p.bias[channel];
    if (p.scale_shift) {
      const float* scale = p.scale_shift + sample * 2 * p.channels + channel;
      modulate(weight, bias, scale[0], scale[p.channels]);
    }
    const Affine a = affine(weight, bias, statistics.mean[group], added(p, sample, channel), statistics.rstd[group]);
    return {{a.center, a.slope, a.offset}};
  }
};

template <int k, int n>
struct Spread {
  f32v of[k][n];
};

// In every lane its channel's coefficients, which are get(channel, group). Whoever loops over rows copies them: the
// copy stays in registers, while any store might change what another function has written.
template <int k, class Row, class Get, int n = Row::registers>
DIFFKERN_ONCE Spread<k, n> spread_channels(const Block& block, const Tile& tile, const Row& row, const Get& get) {
  Spread<k, n> all;
  float lanes[k][n * kLanes] = {};
  for_each_group(block, tile, row.lanes, [&](int64_t group, int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const Coefficients<k> coefficients = get(tile.channel + l, group);
      for (int j = 0; j < k; ++j) lanes[j][l] = coefficients.of[j];
    }
  });
  for (int j = 0; j < k; ++j)
    for (int v = 0; v < n; ++v) all.of[j][v] = load(lanes[j] + v * kLanes);
  return all;
}

template <int k, class Row, class Get, int n = Row::registers>
DIFFKERN_FN Spread<k, n> spread(const GroupNormSiluParams& p, const Block& block, const Tile& tile, const Row& row,
                                const Get& get) {
  if (p.channels_last) return spread_channels<k>(block, tile, row, get);
  Spread<k, n> all;
  const Coefficients<k> coefficients = get(tile.channel, block.group_of(tile.channel));
  for (int j = 0; j < k; ++j)
    for (int v = 0; v < n; ++v) all.of[j][v] = broadcast(coefficients.of[j]);
  return all;
}

}  // namespace

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
