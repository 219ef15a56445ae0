// Products of bfloat16, summed in float32: of AMX tiles, of registers by vdpbf16ps, or of floats if there is neither.
//
// 16 rows of A, or twice 16, meet 32 columns of B. Both lie in blocks of 32 along the depth, of which A may have
// several views (the taps of a convolution). An element's sum goes over the blocks, and in each over the taps: its
// order depends on these alone.
//
// A number may be the sum of several terms, each for what those before it leave (lanes/half.h). Of the products of A's and
// B's terms those are made that are as large as the numbers' own precision: 1, 3 or 6 of them. Three terms are a float,
// and six products as exact as a float's: what is left out is below 2^-24 of it.

#pragma once

#include "lanes/half.h"
#include "layout_bf16.h"

namespace diffkern {

constexpr int64_t kDepth = kDepthBlock, kRows = kTilePixels, kColumns = kPanel;

// Rows of A, over a part of its depth.
struct RowsOfA {
  const BFloat16* tile[2];   // [blocks, terms, 16 rows, kDepth]
  int64_t row, block, term;  // how far apart rows are, and blocks, and terms, in elements
  int64_t blocks;
  const int64_t* tap;  // how far apart the views
};

// C = A B, or C + A B.
struct Product {
  const RowsOfA* parts;  // one after the other
  int64_t part_count, taps;
  const BFloat16* b;  // [blocks of all parts, taps, terms, 2, kDepth / 2, kColumns / 2, 2]: halves, pairs of the depth
  float* c;           // [tiles, kRows, kColumns]
  bool add;           // or C is not read
};

// Terms that meet: all (i, j) with i + j < terms, the smallest products first, and each with one of those before it.
struct Pair {
  int a, b;
};
template <int terms>
constexpr int kPairs = terms * (terms + 1) / 2;
template <int terms>
constexpr Pair kMeet[kPairs<terms>] = {{0, 0}};
template <>
constexpr Pair kMeet<2>[3] = {{0, 1}, {0, 0}, {1, 0}};
template <>
constexpr Pair kMeet<3>[6] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

#if defined(__AMX_BF16__)

struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static constexpr TileConfiguration kAllTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// While there is one, the tiles are this thread's.
struct Unit {
  Unit() { _tile_loadconfig(&kAllTiles); }
  ~Unit() { _tile_release(); }
};

// Without arithmetic of 512 bits its unit goes to sleep after 2000 cycles, and a tile's store then waits 800 for it.
DIFFKERN_FN void keep_awake() { __asm__ volatile("vaddps %%zmm31, %%zmm31, %%zmm31" ::: "xmm31"); }

template <int tiles, int terms>
static void multiply(const Product& p) {
  constexpr int64_t row = kColumns * sizeof(float), half = kColumns / 2, next = kRows * kColumns;
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read what was stored before
  if (p.add) {
    _tile_loadd(0, p.c, row);
    _tile_loadd(1, p.c + half, row);
    if (tiles == 2) _tile_loadd(2, p.c + next, row);
    if (tiles == 2) _tile_loadd(3, p.c + next + half, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const BFloat16* b = p.b;
  for (const RowsOfA* a = p.parts; a != p.parts + p.part_count; ++a)
    for (int64_t block = 0; block < a->blocks; ++block) {
      for (int64_t t = 0; t < p.taps; ++t, b += terms * kDepth * kColumns) {
        const int64_t offset = block * a->block + a->tap[t];
#pragma GCC unroll 6
        for (int i = 0; i < kPairs<terms>; ++i) {  // of a pair, what the one before did not have is loaded
          constexpr const Pair(&pair)[kPairs<terms>] = kMeet<terms>;
          const bool new_a = i == 0 || pair[i].a != pair[i - 1].a, new_b = i == 0 || pair[i].b != pair[i - 1].b;
          const int64_t a_at = offset + pair[i].a * a->term, b_at = pair[i].b * kDepth * kColumns;
          if (new_a) _tile_loadd(4, a->tile[0] + a_at, a->row * 2);
          if (new_b) _tile_loadd(6, b + b_at, 64);
          _tile_dpbf16ps(0, 4, 6);
          if (new_b) _tile_loadd(7, b + b_at + kDepth * half, 64);
          _tile_dpbf16ps(1, 4, 7);
          if (tiles == 1) continue;
          if (new_a) _tile_loadd(5, a->tile[1] + a_at, a->row * 2);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      keep_awake();
    }
  _tile_stored(0, p.c, row);
  _tile_stored(1, p.c + half, row);
  if (tiles == 2) _tile_stored(2, p.c + next, row);
  if (tiles == 2) _tile_stored(3, p.c + next + half, row);
  __asm__ volatile("" ::: "memory");
}

#else

struct Unit {
  ~Unit() {}
};

// sum + a[0] b[0] + a[1] b[1], in each lane
DIFFKERN_FN f32v add_pair(f32v sum, i32v a, i32v b) {
#if defined(__AVX512BF16__)
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  constexpr int32_t high = int32_t(0xFFFF0000);
  sum = multiply_add(as_float(a << 16), as_float(b << 16), sum);
  return multiply_add(as_float(a & high), as_float(b & high), sum);
#endif
}

DIFFKERN_FN i32v load_pairs(const BFloat16* p) {
  i32v pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

DIFFKERN_FN i32v broadcast_pair(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return i32v{} + pair;
}

constexpr int kTileOfRows = kLanes == 16 ? 8 : 4;  // of registers, of which it has two columns

// The tile of C at (row, column).
template <int terms>
static void multiply_registers(const Product& p, int64_t tile, int64_t row, int64_t column) {
  constexpr int64_t half = kColumns / 2;
  float* const c = p.c + (tile * kRows + row) * kColumns + column;
  const BFloat16 *b[2];
  for (int v = 0; v < 2; ++v) {
    const int64_t k = column + v * kLanes;
    b[v] = p.b + k / half * kDepth * half + k % half * 2;
  }
  f32v sum[kTileOfRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTileOfRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[r][v] = p.add ? load(c + r * kColumns + v * kLanes) : f32v{};
  for (const RowsOfA* a = p.parts; a != p.parts + p.part_count; ++a)
    for (int64_t block = 0; block < a->blocks; ++block)
      for (int64_t t = 0; t < p.taps; ++t) {
        const BFloat16* const seen = a->tile[tile] + row * a->row + block * a->block + a->tap[t];
        for (const Pair& pair : kMeet<terms>) {
          const BFloat16* const rows = seen + pair.a * a->term;
          for (int64_t k = 0; k < kDepth; k += 2) {
            i32v b_k[2];
            for (int v = 0; v < 2; ++v) b_k[v] = load_pairs(b[v] + pair.b * kDepth * kColumns + k * half);
#pragma GCC unroll 8
            for (int r = 0; r < kTileOfRows; ++r) {
              const i32v a_rk = broadcast_pair(rows + r * a->row + k);
#pragma GCC unroll 2
              for (int v = 0; v < 2; ++v) sum[r][v] = add_pair(sum[r][v], a_rk, b_k[v]);
            }
          }
        }
        for (int v = 0; v < 2; ++v) b[v] += terms * kDepth * kColumns;
      }
#pragma GCC unroll 8
  for (int r = 0; r < kTileOfRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(c + r * kColumns + v * kLanes, sum[r][v]);
}

template <int tiles, int terms>
static void multiply(const Product& p) {
  for (int64_t column = 0; column < kColumns; column += 2 * kLanes)
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t row = 0; row < kRows; row += kTileOfRows) multiply_registers<terms>(p, tile, row, column);
}

#endif

}  // namespace diffkern
