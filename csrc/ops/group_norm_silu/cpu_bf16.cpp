// y = silu(norm(x + add) (1 + scale) + shift) + residual, norm over groups of channels (Wu & He 2018); its gradient.
//
// A work item is a block of whole groups of one sample. Both layouts are walked as tiles: rows of up to four registers,
// a constant stride apart. In channels_last memory a row is one pixel and its lanes are neighbouring channels; in
// contiguous memory rows and lanes alike are pixels of one channel.
// The order of every sum depends on the shape alone: neither the batch nor the threads change the bits.

#include <type_traits>

#include "cpu/kernels.h"
#include "lanes/half.h"
#include "math/silu.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

// Visitors of tiles are called from several places. One copy of each is enough, and compiles in a third of the time.
#define DIFFKERN_ONCE __attribute__((noinline))

// --- the walk --------------------------------------------------------------------------------------------------------

constexpr int kWidth = 4 * kLanes;  // elements of a row, at most
constexpr int64_t kRun = 128;       // rows that are summed in float, before their sum goes on in double
constexpr int64_t kNear = 8;        // rows whose mean is near enough to that of all

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

// --- statistics ------------------------------------------------------------------------------------------------------

// Of `count` numbers: their mean, and the sum of their squared distances from it.
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

template <int registers>
struct Sums {
  f32v first[registers], second[registers];
};

// Of the distances from a pivot, and of their squares.
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

template <int n>
DIFFKERN_FN float total(const f32v (&a)[n]) {
  f32v sum = a[0];
  for (int v = 1; v < n; ++v) sum = sum + a[v];
  return reduce_add(sum);
}

template <int n>
DIFFKERN_FN void add_lanes(const f32v (&a)[n], double (&to)[n * kLanes]) {
  float lanes[n * kLanes];
  for (int v = 0; v < n; ++v) store(lanes + v * kLanes, a[v]);
  for (int l = 0; l < n * kLanes; ++l) to[l] += lanes[l];
}

DIFFKERN_FN double added(const GroupNormSiluParams& p, int64_t sample, int64_t channel) {
  return p.add ? p.add[sample * p.channels + channel] : 0.0;
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

// What statistics see: a group that lies in one piece, and whose channels nothing is added to, is one channel.
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

// --- coefficients ----------------------------------------------------------------------------------------------------

template <int k>
struct Coefficients {
  float of[k];
};

// Of the groups of a block.
struct Statistics {
  double mean[kMaxGroupsPerBlock], rstd[kMaxGroupsPerBlock];
};

// center, slope, offset: (x - center) slope + offset is z, the argument of silu.
struct Affine {
  const GroupNormSiluParams& p;
  int64_t sample;
  const Statistics& statistics;

  Coefficients<3> operator()(int64_t channel, int64_t group) const {
    double weight = p.weight[channel], bias = p.bias[channel];
    if (p.scale_shift) {
      const float* scale = p.scale_shift + sample * 2 * p.channels + channel;
      weight *= 1.0 + scale[0];
      bias = bias * (1.0 + scale[0]) + scale[p.channels];
    }
    const double center = statistics.mean[group] - added(p, sample, channel), slope = statistics.rstd[group] * weight;
    return {{float(center), float(slope), float(bias + (float(center) - center) * slope)}};
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

// --- forward ---------------------------------------------------------------------------------------------------------

// Where y has the registers of a row: like x, or as a blocked image, whose lines of pixels have zeros around them.
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
        f32v z = multiply_add(row.get(x + r * tile.source_stride + v * kLanes) - center[v], slope[v], offset[v]);
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
  const Affine affine{p, block.sample, statistics};
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    normalise<T, terms>(p, block, tile, row, spread<3>(p, block, tile, row, affine));
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

// What both passes begin with: (x - center) and grad_z of one register.
struct Gradient {
  f32v distance, grad_z;
};

DIFFKERN_FN Gradient gradient_of(f32v x, f32v grad_y, f32v center, f32v slope, f32v offset, bool activate) {
  const f32v distance = x - center;
  if (!activate) return {distance, grad_y};
  return {distance, grad_y * silu_slope(multiply_add(distance, slope, offset))};
}

// Adds up grad_z and grad_z (x - center) of each of the tile's channels.
template <class T, class Row, int n = Row::registers>
void add_gradients(const GroupNormSiluParams& p, const Tile& tile, const Row& row, int64_t sample,
                   const Spread<3, n>& coefficients) {
  const auto [center, slope, offset] = coefficients.of;
  const T* x = tile.template x<T>();
  const T* grad_y = static_cast<const T*>(p.grad_y) + tile.offset;
  const bool activate = p.silu;
  double first_total[n * kLanes] = {}, second_total[n * kLanes] = {};
  for (int64_t first = 0; first < tile.rows; first += kRun) {
    Sums<n> sums{};
    for (int64_t r = first; r < tile.rows && r < first + kRun; ++r)
      for (int v = 0; v < n; ++v) {
        const int64_t i = r * tile.stride + v * kLanes;
        const auto [distance, grad_z] =
            gradient_of(row.get(x + i), row.get(grad_y + i), center[v], slope[v], offset[v], activate);
        sums.first[v] = sums.first[v] + grad_z;
        sums.second[v] = multiply_add(grad_z, distance, sums.second[v]);
      }
    if (p.channels_last) {
      add_lanes(sums.first, first_total);
      add_lanes(sums.second, second_total);
    } else {
      first_total[0] += total(sums.first);
      second_total[0] += total(sums.second);
    }
  }
  const int channels = p.channels_last ? row.lanes : 1;
  for (int l = 0; l < channels; ++l) {
    p.grad_offset[sample * p.channels + tile.channel + l] += float(first_total[l]);
    p.grad_slope[sample * p.channels + tile.channel + l] += float(second_total[l]);
  }
}

// grad_x = slope grad_z + by_distance (x - center) + constant
template <class T, class Row, int n = Row::registers>
void write_gradient(const GroupNormSiluParams& p, const Tile& tile, const Row& row,
                    const Spread<5, n>& coefficients) {
  const auto [center, slope, offset, by_distance, constant] = coefficients.of;
  const T* x = tile.template x<T>();
  const T* grad_y = static_cast<const T*>(p.grad_y) + tile.offset;
  T* grad_x = static_cast<T*>(p.grad_x) + tile.offset;
  const bool activate = p.silu;
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int v = 0; v < n; ++v) {
      const int64_t i = r * tile.stride + v * kLanes;
      const auto [distance, grad_z] =
          gradient_of(row.get(x + i), row.get(grad_y + i), center[v], slope[v], offset[v], activate);
      row.put(grad_x + i, multiply_add(slope[v], grad_z, multiply_add(by_distance[v], distance, constant[v])));
    }
}

// Those of write_gradient. `of_one`, `of_xhat`: of each group rstd m(w grad_z) and rstd m(w grad_z xhat).
struct GradientOf {
  const Affine& affine;
  const double *of_one, *of_xhat;

  Coefficients<5> operator()(int64_t channel, int64_t group) const {
    const auto [center, slope, offset] = affine(channel, group).of;
    return {{center, slope, offset, float(-of_xhat[group] * affine.statistics.rstd[group]), float(-of_one[group])}};
  }
};

// With xhat = (x + add - mean) rstd and m(.) the mean over the group's elements:
// grad_x = rstd (w grad_z - m(w grad_z) - xhat m(w grad_z xhat)), w rstd being the slope.
template <class T>
void backward(const GroupNormSiluParams& p, const Block& block) {
  const int64_t first_channel = block.first_group * block.width, channels = block.groups * block.width;
  float* grad_offset = p.grad_offset + block.sample * p.channels;
  float* grad_slope = p.grad_slope + block.sample * p.channels;
  Statistics statistics;
  for (int64_t g = 0, first = block.sample * p.groups + block.first_group; g < block.groups; ++g) {
    statistics.mean[g] = p.mean[first + g];
    statistics.rstd[g] = p.rstd[first + g];
  }
  const Affine affine{p, block.sample, statistics};

  for (int64_t c = first_channel; c < first_channel + channels; ++c) grad_offset[c] = grad_slope[c] = 0;
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    add_gradients<T>(p, tile, row, block.sample, spread<3>(p, block, tile, row, affine));
  });

  double of_one[kMaxGroupsPerBlock] = {}, of_xhat[kMaxGroupsPerBlock] = {};
  const double share = 1.0 / double(block.width * p.pixels);
  for (int64_t c = first_channel; c < first_channel + channels; ++c) {
    const int64_t g = block.group_of(c);
    grad_slope[c] = float(grad_slope[c] * statistics.rstd[g]);
    const double weight = affine(c, g).of[1] * share;
    of_one[g] += weight * grad_offset[c];
    of_xhat[g] += weight * grad_slope[c];
  }

  const GradientOf gradient{affine, of_one, of_xhat};
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    write_gradient<T>(p, tile, row, spread<5>(p, block, tile, row, gradient));
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

void group_norm_silu_backward(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) switch (p.dtype) {
      case DType::f32: backward<float>(p, block_of(p, item)); break;
      case DType::bf16: backward<BFloat16>(p, block_of(p, item)); break;
      case DType::f16: backward<Float16>(p, block_of(p, item)); break;
    }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
