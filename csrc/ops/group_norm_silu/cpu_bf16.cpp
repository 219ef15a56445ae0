// y = silu(norm(x + add) (1 + scale) + shift) + residual, norm over groups of channels (Wu & He 2018).
//
// First the statistics of a block's groups, then y (cpu_tiles.h).

#include <type_traits>

#include "cpu_tiles.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kNear = 8;  // rows whose mean is near enough to that of all

// --- statistics ------------------------------------------------------------------------------------------------------

// The mean of `count` numbers, and the sum of their squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // With those of n more numbers (Chan, Golub & LeVeque 1979).
  void join(double n, double n_mean, double n_squares) {
    const double share = n / (count + n), apart = n_mean - mean;
    squares += n_squares + apart * apart * count * share;
    mean += apart * share;
    count += n;
  }
};

// Sums of the distances from a pivot, and of their squares.
template <class T, class Row, int n = Row::registers>
DIFFKERN_FN Sums<n> sum_run(const T* x, int64_t rows, int64_t stride, const Row& row, const f32v (&pivot)[n]) {
  Sums<n> sums{};
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < n; ++v) {
      const f32v distance = row.keep(row.get(x + r * stride + v * kLanes) - pivot[v]);
      sums.first[v] = sums.first[v] + distance;
      sums.second[v] = multiply_add(distance, distance, sums.second[v]);
    }
  return sums;
}

// The pivot of a run is the mean so far, and of the first run the mean of its first rows: no float sum is large beside
// what it is for, however far the mean from 0.

// A tile whose lanes are pixels of one channel.
template <class T, class Row, int n = Row::registers>
void add_pixels(const T* x, const Tile& tile, const Row& row, double add, Moments& group) {
  for (int64_t first = 0; first < tile.rows; first += kRun) {
    const int64_t rows = tile.rows - first < kRun ? tile.rows - first : kRun;
    const T* run = x + first * tile.source_stride;
    const double count = double(rows * row.lanes);
    f32v pivot[n]{};
    double near = group.mean - add;
    if (group.count == 0) near = total(sum_run(run, 1, tile.source_stride, row, pivot).first) / row.lanes;
    for (int v = 0; v < n; ++v) pivot[v] = broadcast(float(near));
    const Sums<n> sums = sum_run(run, rows, tile.source_stride, row, pivot);
    const double distance = total(sums.first), offset = distance / count;
    group.join(count, float(near) + add + offset, total(sums.second) - distance * offset);
  }
}

// A tile whose lanes are channels: every lane for itself, then those of a group together.
template <class T, class Row, int n = Row::registers>
void add_channels(const T* x, const Tile& tile, const Row& row, const GroupNormSiluParams& p,
                              const Block& block, Moments* groups) {
  constexpr int lanes = n * kLanes;
  const int64_t few = tile.rows < kNear ? tile.rows : kNear;
  f32v pivot[n]{};
  const Sums<n> own = sum_run(x, few, tile.source_stride, row, pivot);
  for (int v = 0; v < n; ++v) pivot[v] = own.first[v] * (1.0f / float(few));

  int64_t rows = kRun;
  double mean[lanes] = {}, squares[lanes] = {};
  float near[lanes], distance[lanes], square[lanes];
  for (int64_t first = 0; first < tile.rows; first += rows) {
    if (rows > tile.rows - first) rows = tile.rows - first;
    const Sums<n> sums = sum_run(x + first * tile.source_stride, rows, tile.source_stride, row, pivot);
    for (int v = 0; v < n; ++v) {
      store(near + v * kLanes, pivot[v]);
      store(distance + v * kLanes, sums.first[v]);
      store(square + v * kLanes, sums.second[v]);
    }
    const double per_row = 1.0 / double(rows), share = double(rows) / double(first + rows);
    for (int l = 0; l < lanes; ++l) {  // Moments::join
      const double offset = distance[l] * per_row, apart = near[l] + offset - mean[l];
      squares[l] += square[l] - distance[l] * offset + apart * apart * double(first) * share;
      mean[l] += apart * share;
      near[l] = float(mean[l]);
    }
    for (int v = 0; v < n; ++v) pivot[v] = load(near + v * kLanes);
  }
  for_each_group(block, tile, row.lanes, [&](int64_t group, int64_t begin, int64_t end) {
    double sum = 0, own_squares = 0, between = 0;
    for (int64_t l = begin; l < end; ++l) sum += mean[l] += added(p, block.sample, tile.channel + l);
    const double group_mean = sum / double(end - begin);
    for (int64_t l = begin; l < end; ++l) {
      own_squares += squares[l];
      between += (mean[l] - group_mean) * (mean[l] - group_mean);
    }
    groups[group].join(double(tile.rows * (end - begin)), group_mean, own_squares + between * double(tile.rows));
  });
}

// The block as statistics see it: a group that lies in one piece, with nothing added to its channels, is one channel.
struct Flat {
  GroupNormSiluParams params;
  Block block;
};

Flat flatten(const GroupNormSiluParams& p, const Block& block) {
  Flat flat{p, block};
  if (p.channels_last || p.add) return flat;
  flat.params.channels = p.groups;
  flat.params.pixels *= block.width;
  flat.block.width = 1;
  return flat;
}

// --- y ---------------------------------------------------------------------------------------------------------------

// The layout of y: like x, or as a blocked image, whose lines of pixels have zeros around them.
template <int n>
struct Place {
  int64_t lines, pixels;      // so many lines of so many rows of the tile
  int64_t first, line, step;  // where the first row is, how far the next line, and the next row
  int64_t apart;              // terms
  int64_t offset[n];          // of each register

  Place(const GroupNormSiluParams& p, const Block& block, const Tile& tile)
      : lines(1), pixels(tile.rows), first(tile.offset), line(0), step(tile.stride), apart(0) {
    for (int v = 0; v < n; ++v) offset[v] = v * kLanes;
    if (p.blocked_width == 0) return;
    pixels = p.blocked_width, lines = p.pixels / pixels;
    step = kDepthBlock, line = (pixels + 2) * step;
    apart = (lines + 2) * line;
    const int64_t image = p.terms * apart;
    first = block.sample * (p.channels / kDepthBlock) * image + line + step;
    for (int v = 0; v < n; ++v) {
      const int64_t channel = tile.channel + v * kLanes;
      offset[v] = channel / kDepthBlock * image + channel % kDepthBlock;
    }
  }
};

DIFFKERN_FN f32v silu_as(f32v z, const void*) { return silu(z); }
DIFFKERN_FN f32v silu_as(f32v z, const BFloat16*) { return silu_approx(z); }

// Stores z, as y has it: like x, or in terms.
template <int terms, class Y, class Row>
DIFFKERN_FN void put(Y* y, int64_t apart, const Row& row, f32v z) {
  row.put(y, z);
#pragma GCC unroll 2
  for (int i = 1; i < terms; ++i) row.put(y + i * apart, z = less_bfloat16(z));
}

template <class T, int terms, class Row, int n = Row::registers>
void normalise(const GroupNormSiluParams& p, const Block& block, const Tile& tile, const Row& row,
               const Spread<3, n>& coefficients) {
  const auto [center, slope, offset] = coefficients.of;
  const Place<n> place(p, block, tile);
  const T* x = tile.template x<T>();
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + tile.offset : nullptr;
  using Y = std::conditional_t<terms == 0, T, BFloat16>;
  Y* const first = static_cast<Y*>(p.y) + place.first;
  const bool activate = p.silu;
  for (int64_t line = 0; line < place.lines; ++line, x += place.pixels * tile.source_stride) {
    Y* const y = first + line * place.line;
    for (int64_t r = 0; r < place.pixels; ++r)
      for (int v = 0; v < n; ++v) {
        f32v z = normalised(row.get(x + r * tile.source_stride + v * kLanes) - center[v], slope[v], offset[v]);
        if (activate) z = silu_as(z, x);
        if (residual) z = z + row.get(residual + r * tile.stride + v * kLanes);
        put<terms>(y + r * place.step + place.offset[v], place.apart, row, z);
      }
  }
  if (terms == 0) return;
  for (int64_t line = -1; line <= place.lines; ++line) {
    const bool inside = 0 <= line && line < place.lines;
    for (int64_t r = -1; r <= place.pixels; r += inside ? place.pixels + 1 : 1)
      for (int v = 0; v < n; ++v)
        put<terms>(first + line * place.line + r * place.step + place.offset[v], place.apart, row, f32v{});
  }
}

template <class T>
DIFFKERN_ONCE void find_statistics(const GroupNormSiluParams& p, const Block& block, Statistics& statistics) {
  Moments groups[kMaxGroupsPerBlock];
  const Flat flat = flatten(p, block);
  for_each_tile(flat.params, flat.block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    const T* x = tile.template x<T>();
    if (p.channels_last)
      add_channels(x, tile, row, p, block, groups);
    else
      add_pixels(x, tile, row, added(p, block.sample, tile.channel), groups[flat.block.group_of(tile.channel)]);
  });
  const int64_t first = block.sample * p.groups + block.first_group;
  for (int64_t g = 0; g < block.groups; ++g) {
    statistics.mean[g] = groups[g].mean;
    statistics.rstd[g] = 1.0 / __builtin_sqrt(groups[g].squares / groups[g].count + p.eps);
    if (!p.mean) continue;
    p.mean[first + g] = float(statistics.mean[g]);
    p.rstd[first + g] = float(statistics.rstd[g]);
  }
}

template <class T, int terms = 0>
void forward(const GroupNormSiluParams& p, const Block& block) {
  Statistics statistics;
  find_statistics<T>(p, block, statistics);
  const AffineOf affine_of{p, block.sample, statistics};
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    normalise<T, terms>(p, block, tile, row, spread<3>(p, block, tile, row, affine_of));
  });
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  const auto run = [&](auto forward) {
    for (int64_t item = begin; item < end; ++item) forward(p, block_of(p, item));
  };
  switch (p.dtype) {
    case DType::f32: return run(p.terms == 0   ? forward<float>
                                : p.terms == 1 ? forward<float, 1>
                                : p.terms == 2 ? forward<float, 2>
                                               : forward<float, 3>);
    case DType::bf16: return p.terms ? run(forward<BFloat16, 1>) : run(forward<BFloat16>);
    case DType::f16: return run(forward<Float16>);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
