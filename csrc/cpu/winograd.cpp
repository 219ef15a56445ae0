// 3x3 convolution by Winograd's minimal filtering, Y = A^T [(G g G^T) . (B^T d B)] A  (Lavin & Gray 2016): a tile of
// m x m outputs, m = 4 or 2, costs (m + 2)^2 multiplications a channel instead of 9 m^2. In the paper's letters,
// U = G g G^T are the packed weights, V = B^T d B is a transformed tile of the input, and M their product.
// The points are 0, +-5/8, +-5/4, inf for m = 4 (the textbook's 0, +-1, +-2, inf make twice the error) and 0, +-1, inf
// for m = 2; every constant of B and of A is exact in float32.
//
// A work item is a block of tiles, of several images if they are small, and a block of columns, which are output
// channels. A thread takes it from end to end without a barrier: V of the block, with all channels, kept for the
// items that follow on the same tiles; a product V U for each of the (m + 2)^2 matrices; the inverse transform, which
// adds bias and residual. V and M stay in the second-level cache. U passes through the first one, a chunk at a time
// that is asked for while the chunk before it is used: by far the most of the traffic, and hidden.
//
// An element of M is a sum of chains along the channels. Where they are cut depends on the layer's width alone: the
// bits depend neither on the batch nor on how the work is split.

#include <cstdlib>

#include "../math/lanes.h"
#include "kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kChain = 64;                    // channels that are added up one by one: precision is dear here
constexpr int kRegisters = kLanes == 16 ? 4 : 2;  // of columns at a time
constexpr int kSums = 6 * kRegisters;             // registers that add up: 24 of 32, or 12 of 16

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// B^T d and A^T m, the results `step` apart.
template <int m>
struct Transform;

template <>
struct Transform<4> {
  static constexpr float a = 5.0f / 8, b = 5.0f / 4;

  DIFFKERN_FN void input(const f32v* d, f32v* v, int step) {
    constexpr float product = a * a * b * b, sum = a * a + b * b;
    const f32v even_a = d[4] - b * b * d[2], odd_a = d[3] - b * b * d[1];
    const f32v even_b = d[4] - a * a * d[2], odd_b = d[3] - a * a * d[1];
    v[0 * step] = product * d[0] + (d[4] - sum * d[2]);
    v[1 * step] = even_a + a * odd_a;
    v[2 * step] = even_a - a * odd_a;
    v[3 * step] = even_b + b * odd_b;
    v[4 * step] = even_b - b * odd_b;
    v[5 * step] = product * d[1] + (d[5] - sum * d[3]);
  }

  DIFFKERN_FN void output(const f32v* m, f32v* y, int step) {
    const f32v even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const f32v even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0 * step] = m[0] + even_a + even_b;
    y[1 * step] = a * odd_a + b * odd_b;
    y[2 * step] = a * a * even_a + b * b * even_b;
    y[3 * step] = a * a * a * odd_a + (b * b * b * odd_b + m[5]);
  }
};

template <>
struct Transform<2> {
  DIFFKERN_FN void input(const f32v* d, f32v* v, int step) {
    v[0 * step] = d[2] - d[0];
    v[1 * step] = d[2] + d[1];
    v[2 * step] = d[2] - d[1];
    v[3 * step] = d[3] - d[1];
  }

  DIFFKERN_FN void output(const f32v* m, f32v* y, int step) {
    y[0 * step] = m[0] + m[1] + m[2];
    y[1 * step] = m[1] - m[2] + m[3];
  }
};

// M = V U of one of the matrices, over a chunk of the channels.
struct Product {
  const float* v;  // [tiles, depth], a tile apart by v_tile
  const float* u;  // [depth, columns]
  float* m;        // [tiles, columns]
  int64_t tiles, depth, v_tile;
  bool add;           // to what M holds, which is not read otherwise
  const float* next;  // the chunk of U that comes after this one
};

// Some of the tiles: V and M from the first one on. At each channel they ask for next_step values of the next chunk.
template <int matrices, int registers, int tiles>
void multiply_tiles(const Product& p, const float* v, float* m, const float* next, int64_t next_step) {
  f32v sum[tiles][registers] = {};
  const float* u = p.u;
  for (int64_t c = p.depth, v_tile = p.v_tile; c > 0; --c, ++v, u += kWinogradColumns, next += next_step) {
    f32v u_c[registers];
#pragma GCC unroll 4
    for (int j = 0; j < registers; ++j) u_c[j] = load(u + j * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < tiles; ++t) {
      const f32v v_tc = broadcast(v[t * v_tile]);
#pragma GCC unroll 4
      for (int j = 0; j < registers; ++j) sum[t][j] = multiply_add(v_tc, u_c[j], sum[t][j]);
    }
    __builtin_prefetch(next);
  }
#pragma GCC unroll 12
  for (int t = 0; t < tiles; ++t, m += matrices * kWinogradColumns)
#pragma GCC unroll 4
    for (int j = 0; j < registers; ++j)
      store(m + j * kLanes, p.add ? load(m + j * kLanes) + sum[t][j] : sum[t][j]);
}

template <int matrices, int registers, int most>
void multiply_tiles(int tiles, const Product& p, const float* v, float* m, const float* next, int64_t next_step) {
  if (tiles == most)
    multiply_tiles<matrices, registers, most>(p, v, m, next, next_step);
  else if constexpr (most > 1)
    multiply_tiles<matrices, registers, most - 1>(tiles, p, v, m, next, next_step);
}

// All tiles, in as few groups as there are registers for and as even as they come.
template <int matrices, int registers>
void multiply(const Product& p) {
  constexpr int most = registers > 1 ? kSums / registers : 12;
  const int64_t groups = divide_up(p.tiles, most);
  for (int64_t group = 0, tile = 0; group < groups; ++group) {
    const int64_t tiles = (p.tiles - tile) / (groups - group);
    multiply_tiles<matrices, registers, most>(
        int(tiles), p, p.v + tile * p.v_tile, p.m + tile * matrices * kWinogradColumns,
        p.next + group * p.depth * kWinogradColumns / groups, divide_up(kWinogradColumns, groups));
    tile += tiles;
  }
}

// A thread's own memory, a few megabytes that it keeps: to ask for them anew would cost page faults at every layer.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }

  float* reserve(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = divide_up(floats, 1024) * 1024;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
    }
    return data;
  }
};
thread_local Scratch scratch;

// A block of tiles on its way through the layer. V lies in the thread's memory, where the next item finds it.
template <int m>
class Block {
  static constexpr int kSize = m + 2, kMatrices = kSize * kSize;

  const ConvParams& p;
  const int64_t channels = p.depth(), high = p.tiles_high(), wide = p.tiles_wide();
  const int64_t first, tiles;
  // Rows of V begin an odd number of cache lines apart, so that they spread over the sets of a cache; what is behind
  // the last channel is written, but not read.
  const int64_t v_row = (divide_up(channels + kLanes - 1, 16) | 1) * 16, v_tile = kMatrices * v_row;
  static constexpr int64_t kTileM = kMatrices * kWinogradColumns;
  float* v;        // [tiles, matrices, v_row]
  float* product;  // M: [tiles, matrices, columns]
  float* zeros;    // [channels]: a pixel outside the image

  struct Pixel {
    int64_t sample, y, x;
  };

  // The first output of a tile.
  Pixel corner(int64_t tile) const {
    const int64_t row = (first + tile) / wide;
    return {row / high, row % high * m, (first + tile) % wide * m};
  }

  int64_t pixel(Pixel at) const { return (at.sample * p.out_height + at.y) * p.out_width + at.x; }

  // The pixels of x[source] that a tile depends on.
  void patch(Pixel at, int source, const float** d) const {
    const int64_t width = p.channels[source];
    for (int64_t y = at.y - 1; y <= at.y + m; ++y) {
      const bool inside = y >= 0 && y < p.out_height;
      const float* row = static_cast<const float*>(p.x[source]) +
                         (at.sample * p.height + (y >> p.upsample)) * p.width * width;
      for (int64_t x = at.x - 1; x <= at.x + m; ++x)
        *d++ = inside && x >= 0 && x < p.out_width ? row + (x >> p.upsample) * width : zeros;
    }
  }

  // V = B^T d B, a register of channels.
  template <bool whole>
  void transform_input(const float* const* d, int64_t c, int count, float* to) const {
    f32v columns[kSize][kSize];
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) {
      f32v d_j[kSize];
#pragma GCC unroll 6
      for (int i = 0; i < kSize; ++i) {
        const float* pixel = d[i * kSize + j] + c;
        d_j[i] = whole ? load(pixel) : load(pixel, count);
      }
      Transform<m>::input(d_j, &columns[0][j], kSize);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kSize; ++i) {
      f32v v_i[kSize];
      Transform<m>::input(columns[i], v_i, 1);
#pragma GCC unroll 6
      for (int j = 0; j < kSize; ++j) store(to + (i * kSize + j) * v_row, v_i[j]);
    }
  }

  // Y = A^T M A, a register of columns, and what is added to it.
  template <bool whole>
  void transform_output(const float* from, Pixel at, int64_t k, int count) const {
    const auto get = [&](const float* x) { return whole ? load(x) : load(x, count); };
    f32v columns[m][kSize], shift{};
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) {
      f32v m_j[kSize];
#pragma GCC unroll 6
      for (int i = 0; i < kSize; ++i) m_j[i] = load(from + (i * kSize + j) * kWinogradColumns);
      Transform<m>::output(m_j, &columns[0][j], kSize);
    }
    if (p.bias) shift = shift + get(p.bias + k);
    if (p.add) shift = shift + get(p.add + at.sample * p.add_stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
      if (at.y + i >= p.out_height) break;
      f32v y_i[m];
      Transform<m>::output(columns[i], y_i, 1);
#pragma GCC unroll 4
      for (int j = 0; j < m; ++j) {
        if (at.x + j >= p.out_width) break;
        const int64_t to = (pixel(at) + i * p.out_width + j) * p.out_channels + k;
        f32v y = y_i[j] + shift;
        if (p.residual) y = y + get(static_cast<const float*>(p.residual) + to);
        whole ? store(static_cast<float*>(p.y) + to, y) : store(static_cast<float*>(p.y) + to, y, count);
      }
    }
  }

 public:
  Block(const ConvParams& params, int64_t block)
      : p(params), first(block * p.winograd_tiles()), tiles(min(p.winograd_tiles(), p.tiles() - first)) {
    v = scratch.reserve(p.winograd_tiles() * (v_tile + kTileM) + channels);
    product = v + p.winograd_tiles() * v_tile;
    zeros = product + p.winograd_tiles() * kTileM;
  }

  void transform_inputs() const {
    std::memset(zeros, 0, channels * sizeof(float));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* to = v + tile * v_tile;
      for (int source = 0; source < 2; to += p.channels[source++]) {
        if (p.channels[source] == 0) continue;
        const float* d[kMatrices];
        patch(corner(tile), source, d);
        for (int64_t c = 0; c < p.channels[source]; c += kLanes) {
          const int count = int(min(kLanes, p.channels[source] - c));
          count == kLanes ? transform_input<true>(d, c, count, to + c) : transform_input<false>(d, c, count, to + c);
        }
      }
    }
  }

  // M = V U for a block of columns.
  void multiply_by(int64_t column) const {
    const int64_t columns = p.winograd_columns(), panel = channels * kWinogradColumns;
    const int64_t width = min(p.out_channels - column * kWinogradColumns, kWinogradColumns);
    const int64_t chunk = divide_up(channels, divide_up(channels, kChain));
    const float* u = static_cast<const float*>(p.weight) + column * panel;
    for (int64_t matrix = 0; matrix < kMatrices; ++matrix, u += columns * panel) {
      for (int64_t c = 0; c < channels; c += chunk) {
        const bool last = c + chunk >= channels;
        Product part = {.v = v + matrix * v_row + c,
                        .u = u + c * kWinogradColumns,
                        .m = product + matrix * kWinogradColumns,
                        .tiles = tiles,
                        .depth = min(chunk, channels - c),
                        .v_tile = v_tile,
                        .add = c > 0,
                        .next = u + (last ? columns * panel : (c + chunk) * kWinogradColumns)};
        for (int64_t k = 0; k < width; k += kRegisters * kLanes) {
          switch (min(divide_up(width - k, kLanes), kRegisters)) {
            case 4: if constexpr (kRegisters == 4) multiply<kMatrices, 4>(part); break;
            case 3: if constexpr (kRegisters == 4) multiply<kMatrices, 3>(part); break;
            case 2: multiply<kMatrices, 2>(part); break;
            case 1: multiply<kMatrices, 1>(part); break;
          }
          part.u += kRegisters * kLanes;
          part.m += kRegisters * kLanes;
        }
      }
      for (int64_t tile = matrix; tile < tiles; tile += kMatrices) ask_for_outputs(tile, column);
    }
  }

  // What the tile is to be written to soon. A function that only prefetches does nothing in the eyes of GCC, which
  // would not call it.
  __attribute__((always_inline)) void ask_for_outputs(int64_t tile, int64_t column) const {
    const float* y = static_cast<float*>(p.y) + pixel(corner(tile)) * p.out_channels + column * kWinogradColumns;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j)
        for (int64_t k = 0; k < kWinogradColumns; k += 16)
          __builtin_prefetch(y + (i * p.out_width + j) * p.out_channels + k, 0, 2);
  }

  void transform_outputs(int64_t column) const {
    const int64_t end = min((column + 1) * kWinogradColumns, p.out_channels);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Pixel at = corner(tile);
      const float* from = product + tile * kTileM;
      for (int64_t k = column * kWinogradColumns; k < end; k += kLanes, from += kLanes) {
        const int count = int(min(kLanes, end - k));
        count == kLanes ? transform_output<true>(from, at, k, count) : transform_output<false>(from, at, k, count);
      }
    }
  }
};

template <int m>
void convolve(const ConvParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin, columns = p.winograd_columns(); item < end; ++item) {
    const Block<m> block(p, item / columns);
    const int64_t column = item % columns;
    if (item == begin || column == 0) block.transform_inputs();
    block.multiply_by(column);
    block.transform_outputs(column);
  }
}

}  // namespace

void conv_winograd(const ConvParams& p, int64_t begin, int64_t end) {
  p.tile() == 4 ? convolve<4>(p, begin, end) : convolve<2>(p, begin, end);
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
