// 3x3 convolution by Winograd's minimal filtering, Y = A^T [(G g G^T) . (B^T d B)] A  (Lavin & Gray 2016): a tile of
// 4 x 4 outputs costs 36 multiplications a channel instead of 144. In the paper's letters, U = G g G^T are the packed
// weights, V = B^T d B is a transformed tile of the input, and M their product.
//
// A work item is a block of tiles, of several images if they are small, and a block of columns, which are output
// channels. A thread takes it from end to end without a barrier: V of the block, with all channels, kept for the
// items that follow on the same tiles; a product V U for each of the 36 matrices; the inverse transform, which
// adds bias and residual. V and M stay in the second-level cache. U passes through the first one, a chunk at a time
// that is asked for while the chunk before it is used: by far the most of the traffic, and hidden.
//
// For few tiles cpu_winograd_taps_fma.cpp is faster, which has the same bits.

#include "winograd_tiles.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int kRegisters = kLanes == 16 ? 4 : 2;  // of columns at a time
constexpr int kSums = 6 * kRegisters;             // registers that add up: 24 of 32, or 12 of 16

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
template <int registers, int tiles>
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
  for (int t = 0; t < tiles; ++t, m += kMatrices * kWinogradColumns)
#pragma GCC unroll 4
    for (int j = 0; j < registers; ++j)
      store(m + j * kLanes, p.add ? load(m + j * kLanes) + sum[t][j] : sum[t][j]);
}

template <int registers, int most>
void multiply_tiles(int tiles, const Product& p, const float* v, float* m, const float* next, int64_t next_step) {
  if (tiles == most)
    multiply_tiles<registers, most>(p, v, m, next, next_step);
  else if constexpr (most > 1)
    multiply_tiles<registers, most - 1>(tiles, p, v, m, next, next_step);
}

// All tiles, in as few groups as there are registers for and as even as they come.
template <int registers>
void multiply(const Product& p) {
  constexpr int most = registers > 1 ? kSums / registers : 12;
  const int64_t groups = divide_up(p.tiles, most);
  for (int64_t group = 0, tile = 0; group < groups; ++group) {
    const int64_t tiles = (p.tiles - tile) / (groups - group);
    multiply_tiles<registers, most>(
        int(tiles), p, p.v + tile * p.v_tile, p.m + tile * kMatrices * kWinogradColumns,
        p.next + group * p.depth * kWinogradColumns / groups, divide_up(kWinogradColumns, groups));
    tile += tiles;
  }
}

// A block of tiles on its way through the layer. V lies in the thread's memory, where the next item finds it.
class Block {
  const ConvParams& p;
  const Tiles all{p};
  const int64_t channels = p.depth(), first, tiles;
  // Rows of V begin an odd number of cache lines apart, so that they spread over the sets of a cache; what is behind
  // the last channel is written, but not read.
  const int64_t v_row = (divide_up(channels + kLanes - 1, 16) | 1) * 16, v_tile = kMatrices * v_row;
  static constexpr int64_t kTileM = kMatrices * kWinogradColumns;
  float* v;        // [tiles, matrices, v_row]
  float* product;  // M: [tiles, matrices, columns]
  float* zeros;    // [channels]: a pixel outside the image

 public:
  Block(const ConvParams& params, int64_t block)
      : p(params), first(block * p.winograd_tiles()), tiles(min(p.winograd_tiles(), p.tiles() - first)) {
    v = scratch_floats(p.winograd_tiles() * (v_tile + kTileM) + channels);
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
        all.patch(all.corner(first + tile), source, zeros, d);
        for (int64_t c = 0; c < p.channels[source]; c += kLanes) {
          const int count = int(min(kLanes, p.channels[source] - c));
          count == kLanes ? transform_input<true>(d, c, count, to + c, v_row)
                          : transform_input<false>(d, c, count, to + c, v_row);
        }
      }
    }
  }

  // M = V U for a block of columns.
  void multiply_by(int64_t column) const {
    const int64_t columns = p.winograd_columns(), panel = channels * kWinogradColumns;
    const int64_t width = min(p.out_channels - column * kWinogradColumns, kWinogradColumns);
    const float* u = static_cast<const float*>(p.weight) + column * panel;
    for (int64_t matrix = 0; matrix < kMatrices; ++matrix, u += columns * panel) {
      for (int64_t c = 0; c < channels; c += kWinogradChain) {
        const bool last = c + kWinogradChain >= channels;
        Product part = {.v = v + matrix * v_row + c,
                        .u = u + c * kWinogradColumns,
                        .m = product + matrix * kWinogradColumns,
                        .tiles = tiles,
                        .depth = min(kWinogradChain, channels - c),
                        .v_tile = v_tile,
                        .add = c > 0,
                        .next = u + (last ? columns * panel : (c + kWinogradChain) * kWinogradColumns)};
        for (int64_t k = 0; k < width; k += kRegisters * kLanes) {
          switch (min(divide_up(width - k, kLanes), kRegisters)) {
            case 4: if constexpr (kRegisters == 4) multiply<4>(part); break;
            case 3: if constexpr (kRegisters == 4) multiply<3>(part); break;
            case 2: multiply<2>(part); break;
            case 1: multiply<1>(part); break;
          }
          part.u += kRegisters * kLanes;
          part.m += kRegisters * kLanes;
        }
      }
      for (int64_t tile = matrix; tile < tiles; tile += kMatrices)
        all.ask_for_outputs(all.corner(first + tile), column * kWinogradColumns, kWinogradColumns);
    }
  }

  void transform_outputs(int64_t column) const {
    const int64_t end = min((column + 1) * kWinogradColumns, p.out_channels);
    for (int64_t tile = 0; tile < tiles; ++tile)
      all.transform_output(product + tile * kTileM, kSize * kWinogradColumns, kWinogradColumns,
                           all.corner(first + tile), column * kWinogradColumns, end);
  }
};

}  // namespace

void conv_winograd(const ConvParams& p, int64_t begin, int64_t end) {
  convolve<Block>(p, begin, end);
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
