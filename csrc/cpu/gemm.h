// Products of small blocks of float32 matrices, a tile of registers at a time.
//
// A is read one value at a time and broadcast, so it may lie in memory any way round; rows of B and C are contiguous.
// An element of C is one chain of multiply_add along the depth: the same bits whatever tile it falls into.

#pragma once

#include "lanes/lanes.h"

namespace diffkern {

constexpr int kTileRows = 6;                          // tiles of 6 x 4 registers where there are 32,
constexpr int kTileRegisters = kLanes == 16 ? 4 : 2;  // and of 6 x 2 where there are 16
constexpr int kTileColumns = kTileRegisters * kLanes;
constexpr int kPrefetch = 6;  // rows of B ahead, about 70 cycles

// C = after (before C + bias + A B), or C = after (bias + A B).
// A may be cut into parts along the depth, whose rows may lie anywhere.
struct Product {
  int64_t rows, columns, depth;  // depth: of a part
  const float* a;                // [rows, depth]
  int64_t a_row, a_depth;
  const float* b;  // [depth, columns]
  int64_t b_depth;
  float* c;  // [rows, columns]
  int64_t c_row;
  bool add;                       // or C is not read
  const float* before = nullptr;  // [rows], or null: 1
  const float* after = nullptr;   // [rows], or null: 1
  const float* bias = nullptr;    // [columns], or null: 0

  int64_t parts = 1;
  const float* const* a_rows = nullptr;  // [parts, rows], instead of a and a_row
  int64_t b_part = 0;                    // from a part of B to the next

  const float* row_of_a(int64_t part, int64_t row) const {
    return a_rows ? a_rows[part * rows + row] : a + row * a_row;
  }
};

// The tile of C at (row, column); its last register holds `last` columns, kLanes of them if it is whole.
template <int rows, int registers, bool whole, bool b_cached>
static void multiply_tile(const Product& p, int64_t row, int64_t column, int last) {
  const auto load_b = [&](const float* from, int v) __attribute__((always_inline)) {
    return whole || v < registers - 1 ? load(from + v * kLanes) : load(from + v * kLanes, last);
  };
  f32v sum[rows][registers];
#pragma GCC unroll 4
  for (int v = 0; v < registers; ++v) {
    sum[0][v] = p.bias ? load_b(p.bias + column, v) : f32v{};
#pragma GCC unroll 6
    for (int r = 1; r < rows; ++r) sum[r][v] = sum[0][v];
  }
  const int64_t a_end = p.depth * p.a_depth, a_depth = p.a_depth, b_depth = p.b_depth;
  for (int64_t part = 0; part < p.parts; ++part) {
    const float *a[rows], *b = p.b + part * p.b_part + column;
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) a[r] = p.row_of_a(part, row + r);
    for (int64_t k = 0; k < a_end; k += a_depth, b += b_depth) {
      f32v b_k[registers];
#pragma GCC unroll 4
      for (int v = 0; v < registers; ++v) b_k[v] = load_b(b, v);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const f32v a_rk = broadcast(a[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < registers; ++v) sum[r][v] = multiply_add(a_rk, b_k[v], sum[r][v]);
      }
      if (!b_cached)
        for (int v = 0; v < registers; ++v)  // rows of B may be pages apart: no processor foresees them
          __builtin_prefetch(b + kPrefetch * b_depth + v * kLanes);
    }
  }
  float* c = p.c + row * p.c_row + column;
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r, c += p.c_row) {
    const f32v before = broadcast(p.before ? p.before[row + r] : 1.0f);
    const f32v after = broadcast(p.after ? p.after[row + r] : 1.0f);
#pragma GCC unroll 4
    for (int v = 0; v < registers; ++v) {
      f32v total = sum[r][v];
      if (p.add) total = multiply_add(before, load_b(c, v), total);
      if (p.after) total = total * after;
      if (whole || v < registers - 1)
        store(c + v * kLanes, total);
      else
        store(c + v * kLanes, total, last);
    }
  }
}

// Columns [column, column + registers) of C, registers that is, by tiles of as many rows as are left.
template <int registers, bool whole, bool b_cached>
static void multiply_panel(const Product& p, int64_t column, int last) {
  const auto tiles = [&]<int rows>(int64_t row) __attribute__((always_inline)) {
    for (; row + rows <= p.rows; row += rows)
      multiply_tile<rows, registers, whole, b_cached>(p, row, column, last);
    return row;
  };
  int64_t row = tiles.template operator()<kTileRows>(0);
  row = tiles.template operator()<4>(row);
  row = tiles.template operator()<2>(row);
  tiles.template operator()<1>(row);
}

// b_cached: B was just made, so that its rows need not be asked for.
template <bool b_cached = false>
static void multiply(const Product& p) {
  int64_t column = 0;
  for (; column + kTileColumns <= p.columns; column += kTileColumns)
    multiply_panel<kTileRegisters, true, b_cached>(p, column, kLanes);
  const auto narrow = [&]<int registers>() __attribute__((always_inline)) {
    const int last = int(p.columns - column) - (registers - 1) * kLanes;
    if (last == kLanes)
      multiply_panel<registers, true, b_cached>(p, column, last);
    else
      multiply_panel<registers, false, b_cached>(p, column, last);
  };
  switch ((p.columns - column + kLanes - 1) / kLanes) {
    case 4: if constexpr (kTileRegisters == 4) narrow.template operator()<4>(); break;
    case 3: if constexpr (kTileRegisters == 4) narrow.template operator()<3>(); break;
    case 2: narrow.template operator()<2>(); break;
    case 1: narrow.template operator()<1>(); break;
  }
}

DIFFKERN_FN int64_t whole_registers(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// columns[c][r] = scale rows[r][c]. Written are whole registers both ways: rows beyond the last repeat it.
static inline void transpose(const float* rows, int64_t row_stride, int64_t count, int64_t depth, float scale,
                             float* columns, int64_t width) {
  for (int64_t c = 0; c < depth; c += kLanes, columns += kLanes * width)
    for (int64_t r = 0; r < whole_registers(count); r += 4) {
      f32v x[4];
      for (int i = 0; i < 4; ++i) {
        const float* row = rows + (r + i < count ? r + i : count - 1) * row_stride + c;
        x[i] = (c + kLanes <= depth ? load(row) : load(row, int(depth - c))) * scale;
      }
      transpose_quads(x);
      for (int i = 0; i < 4; ++i)  // x[i] holds channels c + i, c + i + 4, ...
        for (int j = 0; j < kLanes; j += 4)
          std::memcpy(columns + (i + j) * width + r, (const float*)&x[i] + j, 4 * sizeof(float));
    }
}

}  // namespace diffkern
