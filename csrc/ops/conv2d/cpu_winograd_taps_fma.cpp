// 3x3 convolution by Winograd's F(4x4, 3x3) (winograd.h) for few tiles: of one small image, say. U = G g G^T, 36
// matrices, is then mostly read, and from memory at that: here it is made of the 9 taps where it is used, to the bit
// what cpu_winograd_fma.cpp reads.
//
// A work item is a block of tiles and a block of columns. V of its tiles is kept for the items that follow. The weights go
// by once, a few channels at a time: of these, a row of U after the other is made in the first-level cache and multiplied
// with V, and the sums are left in the second level. The taps of the next channels are asked for meanwhile.

#include "winograd_tiles.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int64_t kDepth = kTapDepth, kColumns = kTapColumns;
constexpr int kPair = 2 * kLanes;             // columns at a time
constexpr int kTiles = kLanes == 16 ? 6 : 3;  // and tiles: of two matrices, 24 registers add up of 32, or 12 of 16

static_assert(kWinogradChain % kDepth == 0);

constexpr float kA = Transform::a, kB = Transform::b;  // the points
// The rows of G are (1, 0, 0), (1, +-a, a^2), (1, +-b, b^2) and (0, 0, 1), each times its factor here.
constexpr double kScale[kSize] = {Transform::g_0, Transform::g_a, Transform::g_a,
                                  Transform::g_b, Transform::g_b, 1};

// Row i of G, without its factor, times (g[0], g[1], g[2]).
template <int i>
DIFFKERN_FN f32v at_point(const f32v* g) {
  constexpr float point = i == 1 ? kA : i == 2 ? -kA : i == 3 ? kB : -kB;
  if (i == 0) return g[0];
  if (i == 5) return g[2];
  return multiply_add(broadcast(point), g[1], multiply_add(broadcast(point * point), g[2], g[0]));
}

// Row i of U = G g G^T, of some channels and a pair of registers of columns: u[j][c][k].
template <int i>
void make_row(const float* taps, int64_t depth, float* u) {
  // The factors of both sides at once, times a point.
  const auto scaled = [](int j, float point) { return broadcast(float(kScale[i] * kScale[j] * point)); };
  for (int64_t c = 0; c < depth; ++c, taps += 9 * kColumns, u += kPair)
#pragma GCC unroll 2
    for (int k = 0; k < kPair; k += kLanes) {
      f32v t[3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const float* g = taps + j * kColumns + k;
        const f32v column[3] = {load(g), load(g + 3 * kColumns), load(g + 6 * kColumns)};
        t[j] = at_point<i>(column);
      }
      const f32v even_a = scaled(1, 1) * multiply_add(broadcast(kA * kA), t[2], t[0]);
      const f32v even_b = scaled(3, 1) * multiply_add(broadcast(kB * kB), t[2], t[0]);
      const f32v u_i[kSize] = {scaled(0, 1) * t[0],
                               multiply_add(scaled(1, kA), t[1], even_a),
                               multiply_add(scaled(1, -kA), t[1], even_a),
                               multiply_add(scaled(3, kB), t[1], even_b),
                               multiply_add(scaled(3, -kB), t[1], even_b),
                               scaled(5, 1) * t[2]};
#pragma GCC unroll 6
      for (int j = 0; j < kSize; ++j) store(u + j * kDepth * kPair + k, u_i[j]);
    }
}

// Both kernels of this file go through these, so that their U is the same to the bit.
constexpr void (*kMakeRow[kSize])(const float* taps, int64_t depth, float* u) = {
    make_row<0>, make_row<1>, make_row<2>, make_row<3>, make_row<4>, make_row<5>};

// M (+)= V U for two neighbours of a row of the matrices, over a few channels. A chain of additions goes on from call
// to call: `chain` is where it is kept, `product` what it is added to in the end.
struct Product {
  const float* v;  // [tiles, kSize, kDepth]
  const float* u;  // [2, kDepth, kPair]
  float* chain;    // [tiles, kSize, kColumns], and so is product
  float* product;
  int64_t depth;
  bool first, last, add;  // in the chain; to what product holds, which is not read otherwise
  const float* next;      // [depth, 16]: to be asked for, or null
};

template <int tiles>
void multiply_tiles(const Product& p) {
  const auto each = [](const auto& use) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) use(t, j, k, (t * kSize + j) * kColumns + k * kLanes);
  };
  f32v sum[tiles][2][2] = {};
  if (!p.first) each([&](int t, int j, int k, int64_t at) { sum[t][j][k] = load(p.chain + at); });
  const float *v = p.v, *u = p.u, *next = p.next;
  for (int64_t c = p.depth; c > 0; --c, ++v, u += kPair) {
    const f32v u_c[2][2] = {{load(u), load(u + kLanes)},
                            {load(u + kDepth * kPair), load(u + kDepth * kPair + kLanes)}};
#pragma GCC unroll 6
    for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const f32v v_tj = broadcast(v[(t * kSize + j) * kDepth]);
        sum[t][j][0] = multiply_add(v_tj, u_c[j][0], sum[t][j][0]);
        sum[t][j][1] = multiply_add(v_tj, u_c[j][1], sum[t][j][1]);
      }
    if (next) __builtin_prefetch(next, 0, 2), next += 16;
  }
  float* to = p.last ? p.product : p.chain;
  if (p.last && p.add) each([&](int t, int j, int k, int64_t at) { sum[t][j][k] = load(to + at) + sum[t][j][k]; });
  each([&](int t, int j, int k, int64_t at) { store(to + at, sum[t][j][k]); });
}

template <int most>
void multiply_tiles(int64_t tiles, const Product& p) {
  if (tiles == most)
    multiply_tiles<most>(p);
  else if constexpr (most > 1)
    multiply_tiles<most - 1>(tiles, p);
}

// A block of tiles on its way through the layer. V lies in the thread's memory, where the next item finds it.
class Block {
  const ConvParams& p;
  const Tiles all{p};
  const int64_t channels = p.depth(), depths = divide_up(channels, kDepth);
  const int64_t first, tiles;
  const int64_t v_row = p.winograd_tiles() * kSize * kDepth, m_row = p.winograd_tiles() * kSize * kColumns;
  float* v;        // [depths, kSize, tiles, kSize, kDepth]
  float* u;        // [kSize, kDepth, kPair]: a row of the matrices
  float* chain;    // [kSize, tiles, kSize, kColumns], and so is product: M
  float* product;
  float* zeros;    // [channels]: a pixel outside the image

 public:
  Block(const ConvParams& params, int64_t block)
      : p(params), first(block * p.winograd_tiles()), tiles(min(p.winograd_tiles(), p.tiles() - first)) {
    const int64_t v_size = depths * kSize * v_row, u_size = kSize * kDepth * kPair, m_size = kSize * m_row;
    v = scratch_floats(v_size + u_size + 2 * m_size + channels);
    u = v + v_size;
    chain = u + u_size;
    product = chain + m_size;
    zeros = product + m_size;
  }

  // V = B^T d B
  void transform_inputs() const {
    std::memset(zeros, 0, channels * sizeof(float));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* d[2][kMatrices];
      for (int source = 0; source < 2; ++source) all.patch(all.corner(first + tile), source, zeros, d[source]);
      for (int64_t depth = 0; depth < depths; ++depth) {
        float* to = v + depth * kSize * v_row + tile * kSize * kDepth;
        const int source = depth * kDepth >= p.channels[0];
        const int64_t c = depth * kDepth - source * p.channels[0];
        if (c + kDepth <= p.channels[source])
          transform_input(d[source], c, to);
        else
          join_input(d, depth * kDepth, to);
      }
    }
  }

  void transform_input(const float* const* d, int64_t channel, float* to) const {
    for (int64_t lane = 0; lane < kDepth; lane += kLanes)
      transform<kSize, kSize>(
          Transform::input,
          [&](int i, int j) __attribute__((always_inline)) { return load(d[i * kSize + j] + channel + lane); },
          [&](int i, int j, f32v value) __attribute__((always_inline)) {
            store(to + i * v_row + j * kDepth + lane, value);
          });
  }

  // Channels that lie in both sources, or beyond the last one.
  void join_input(const float* const (*d)[kMatrices], int64_t channel, float* to) const {
    float joined[kMatrices][kDepth] = {};
    const float* at[kMatrices];
    for (int i = 0; i < kMatrices; ++i) {
      at[i] = joined[i];
      for (int64_t c = channel; c < min(channel + kDepth, channels); ++c)
        joined[i][c - channel] = c < p.channels[0] ? d[0][i][c] : d[1][i][c - p.channels[0]];
    }
    transform_input(at, 0, to);
  }

  // M = V U for a block of columns.
  void multiply_by(int64_t column) const {
    const float* taps = static_cast<const float*>(p.weight) + column * channels * 9 * kColumns;
    const int64_t groups = divide_up(tiles, kTiles);
    for (int64_t k = 0; k < kColumns; k += kPair)
      for (int64_t c = 0; c < channels; c += kDepth) {
        const int64_t depth = min(kDepth, channels - c);
        const float* next = taps + (c + depth) * 9 * kColumns;
        for (int i = 0; i < kSize; ++i) {
          kMakeRow[i](taps + c * 9 * kColumns + k, depth, u);
          for (int64_t group = 0, tile = 0; group < groups; ++group) {
            const int64_t count = (tiles - tile) / (groups - group);
            for (int j = 0; j < kSize; j += 2) {
              const int64_t at = i * m_row + (tile * kSize + j) * kColumns + k;
              multiply_tiles<kTiles>(count, {.v = v + (c / kDepth * kSize + i) * v_row + (tile * kSize + j) * kDepth,
                                             .u = u + j * kDepth * kPair,
                                             .chain = chain + at,
                                             .product = product + at,
                                             .depth = depth,
                                             .first = c % kWinogradChain == 0,
                                             .last = (c + depth) % kWinogradChain == 0 || c + depth == channels,
                                             .add = c >= kWinogradChain,
                                             .next = group == 0 ? next : nullptr});
              if (group == 0) next += depth * 16;
            }
            tile += count;
          }
        }
      }
  }

  void transform_outputs(int64_t column) const {
    const int64_t end = min((column + 1) * kColumns, p.out_channels);
    for (int64_t tile = 0; tile < tiles; ++tile)
      all.transform_output(product + tile * kSize * kColumns, m_row, kColumns, all.corner(first + tile),
                           column * kColumns, end);
  }
};

}  // namespace

void conv_winograd_taps(const ConvParams& p, int64_t begin, int64_t end) {
  convolve<Block>(p, begin, end);
}

// U as cpu_winograd_fma.cpp reads it.
void expand_taps(const ExpandTapsParams& p, int64_t begin, int64_t end) {
  alignas(64) float u[kSize * kDepth * kPair];
  const int64_t matrix = p.column_blocks * p.channels * kWinogradColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item / p.depths() * kColumns, channel = item % p.depths() * kDepth;
    const int64_t depth = min(kDepth, p.channels - channel);
    const float* taps = p.taps + (column * p.channels + channel * kColumns) * 9;
    float* to = p.matrices + (column / kWinogradColumns * p.channels + channel) * kWinogradColumns +
                column % kWinogradColumns;
    for (int64_t k = 0; k < kColumns; k += kPair)
      for (int i = 0; i < kSize; ++i) {
        kMakeRow[i](taps + k, depth, u);
        for (int j = 0; j < kSize; ++j)
          for (int64_t c = 0; c < depth; ++c)
            std::memcpy(to + (i * kSize + j) * matrix + c * kWinogradColumns + k, u + (j * kDepth + c) * kPair,
                        kPair * sizeof(float));
      }
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
