// The weight gradient of a 3x3 convolution, by the adjoint of Winograd's algorithm (winograd.h): with V = B^T d B of a
// tile of x and E = A dy A^T of the same tile of grad_y, dg = G^T [ sum over the tiles of E . V ] G.
//
// A work item is a block of output channels, one of channels, and a part of the tiles. The sums of the 36 matrices over
// this part stay in the second-level cache, while the tiles go by in blocks, of which V and E are made beside them. The
// parts are then added up in their order, however many threads there are.

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/winograd.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kTiles = Conv3x3GradientParams::kTiles, kChannels = Conv3x3GradientParams::kChannels;
// Matrices are a cache line more than a power of two apart, so that they spread over the sets of a cache.
constexpr int64_t kMatrix = kTiles * kChannels + 16, kMatrixSum = kChannels * kChannels + 16;

class WeightBlock {
  const Conv3x3GradientParams& p;
  const int64_t part;
  const int64_t k, rows;     // output channels
  const int64_t c, columns;  // channels
  float* const v;            // [matrices][tiles, columns]
  float* const e;            // [matrices][tiles, rows]
  float* const sum;          // [matrices][rows, columns]

  // V or E of a tile: of the size x size pixels of an image from (y, x) on, `count` of their channels from `first` on.
  template <int size, class T>
  void transform_pixels(T one_side, const float* image, int64_t channels, int64_t y, int64_t x, int64_t first,
                        int64_t count, float* to) const {
    alignas(64) static constexpr float outside[kChannels] = {};
    const float* pixels[size * size];
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) {
        const bool inside = y + i >= 0 && y + i < p.height && x + j >= 0 && x + j < p.width;
        pixels[i * size + j] = inside ? image + ((y + i) * p.width + x + j) * channels + first : outside;
      }
    for (int64_t channel = 0; channel < count; channel += kLanes) {
      const int lanes = int(min(kLanes, count - channel));
      transform<size, kSize>(
          one_side,
          [&](int i, int j) __attribute__((always_inline)) { return load(pixels[i * size + j] + channel, lanes); },
          [&](int i, int j, f32v value) __attribute__((always_inline)) {
            store(to + (i * kSize + j) * kMatrix + channel, value);
          });
    }
  }

  // sum (+)= E^T V over a block of tiles.
  void add_tiles(int64_t first, int64_t tiles, bool add) const {
    const int64_t wide = p.tiles_wide(), high = p.tiles_high(), pixels = p.height * p.width;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = (first + tile) / wide, sample = row / high;
      const int64_t y = row % high * kTile, x = (first + tile) % wide * kTile;
      transform_pixels<kSize>(Transform::input, p.x + sample * pixels * p.channels, p.channels, y - 1, x - 1, c,
                              columns, v + tile * kChannels);
      transform_pixels<kTile>(Transform::output_gradient, p.grad_y + sample * pixels * p.out_channels, p.out_channels, y,
                          x, k, rows, e + tile * kChannels);
    }
    for (int64_t matrix = 0; matrix < kMatrices; ++matrix)
      multiply<true>({.rows = rows, .columns = whole_registers(columns), .depth = tiles,
                      .a = e + matrix * kMatrix, .a_row = 1, .a_depth = kChannels,
                      .b = v + matrix * kMatrix, .b_depth = kChannels,
                      .c = sum + matrix * kMatrixSum, .c_row = kChannels, .add = add});
  }

  void transform_sums() const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int count = int(min(kLanes, columns - column));
        const float* from = sum + row * kChannels + column;
        float* to = p.parts + (part * p.out_channels + k + row) * 9 * p.channels + c + column;
        transform<kSize, 3>(
            Transform::weight_gradient,
            [&](int i, int j) __attribute__((always_inline)) { return load(from + (i * kSize + j) * kMatrixSum); },
            [&](int i, int j, f32v value) __attribute__((always_inline)) {
              store(to + (i * 3 + j) * p.channels, value, count);
            });
      }
  }

 public:
  WeightBlock(const Conv3x3GradientParams& params, int64_t item)
      : p(params),
        part(item / p.blocks()),
        k(item % p.blocks() / p.channel_blocks() * kChannels),
        rows(min(kChannels, p.out_channels - k)),
        c(item % p.channel_blocks() * kChannels),
        columns(min(kChannels, p.channels - c)),
        v(scratch_floats(kMatrices * (2 * kMatrix + kMatrixSum))),
        e(v + kMatrices * kMatrix),
        sum(e + kMatrices * kMatrix) {}

  void differentiate() const {
    const int64_t first = part * p.tiles() / p.part_count, end = (part + 1) * p.tiles() / p.part_count;
    for (int64_t tile = first; tile < end; tile += kTiles) add_tiles(tile, min(kTiles, end - tile), tile > first);
    transform_sums();
  }
};

}  // namespace

void conv3x3_gradient(const Conv3x3GradientParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) WeightBlock(p, item).differentiate();
}

void conv3x3_sum_parts(const Conv3x3GradientParams& p, int64_t begin, int64_t end) {
  const int64_t elements = p.out_channels * 9 * p.channels, last = min(end * kChunk, elements);
  for (int64_t i = begin * kChunk; i < last; i += kLanes) {
    const int count = int(min(kLanes, last - i));
    f32v sum{};
    for (int64_t part = 0; part < p.part_count; ++part) sum = sum + load(p.parts + part * elements + i, count);
    store(p.grad_weight + i, sum, count);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
