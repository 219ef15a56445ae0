// Winograd's minimal filtering of 3x3 kernels (Lavin & Gray 2016), Y = A^T [(G g G^T) . (B^T d B)] A: the transforms of
// a tile of 4x4 outputs, F(4x4, 3x3), and their adjoints, of which the weight's gradient is made.
// The points are 0, +-5/8, +-5/4, inf (the textbook's 0, +-1, +-2, inf make twice the error); every constant of B and of
// A is exact in float32.

#pragma once

#include "integers.h"
#include "lanes/lanes.h"
#include "scratch.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

constexpr int kTile = 4, kSize = kTile + 2, kMatrices = kSize * kSize;

// s x + y, rounded once where it can be. Written down, so that kernels that share a transform share its bits, whatever
// else a compiler would contract.
DIFFKERN_FN f32v times(float s, f32v x, f32v y) { return multiply_add(broadcast(s), x, y); }

// One side: B^T d, A^T m, and of gradients A dy and G^T du. The results are `step` apart.
struct Transform {
  static constexpr float a = 5.0f / 8, b = 5.0f / 4;
  static constexpr double a2 = a * a, b2 = b * b;
  static constexpr double g_0 = 1 / (a2 * b2), g_a = 1 / (2 * a2 * (a2 - b2)), g_b = 1 / (2 * b2 * (b2 - a2));

  DIFFKERN_FN void input(const f32v* d, f32v* v, int step) {
    constexpr float product = a * a * b * b, sum = a * a + b * b;
    const f32v even_a = times(-b * b, d[2], d[4]), odd_a = times(-b * b, d[1], d[3]);
    const f32v even_b = times(-a * a, d[2], d[4]), odd_b = times(-a * a, d[1], d[3]);
    v[0 * step] = times(product, d[0], times(-sum, d[2], d[4]));
    v[1 * step] = times(a, odd_a, even_a);
    v[2 * step] = times(-a, odd_a, even_a);
    v[3 * step] = times(b, odd_b, even_b);
    v[4 * step] = times(-b, odd_b, even_b);
    v[5 * step] = times(product, d[1], times(-sum, d[3], d[5]));
  }

  DIFFKERN_FN void output(const f32v* m, f32v* y, int step) {
    const f32v even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const f32v even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0 * step] = m[0] + even_a + even_b;
    y[1 * step] = times(a, odd_a, b * odd_b);
    y[2 * step] = times(a * a, even_a, b * b * even_b);
    y[3 * step] = times(a * a * a, odd_a, times(b * b * b, odd_b, m[5]));
  }

  DIFFKERN_FN void output_gradient(const f32v* y, f32v* m, int step) {
    const f32v even_a = y[0] + a * a * y[2], odd_a = y[1] + a * a * y[3];
    const f32v even_b = y[0] + b * b * y[2], odd_b = y[1] + b * b * y[3];
    m[0 * step] = y[0];
    m[1 * step] = even_a + a * odd_a;
    m[2 * step] = even_a - a * odd_a;
    m[3 * step] = even_b + b * odd_b;
    m[4 * step] = even_b - b * odd_b;
    m[5 * step] = y[3];
  }

  DIFFKERN_FN void weight_gradient(const f32v* u, f32v* g, int step) {
    const f32v even_a = float(g_a) * (u[1] + u[2]), odd_a = float(g_a * a) * (u[1] - u[2]);
    const f32v even_b = float(g_b) * (u[3] + u[4]), odd_b = float(g_b * b) * (u[3] - u[4]);
    g[0 * step] = float(g_0) * u[0] + (even_a + even_b);
    g[1 * step] = odd_a + odd_b;
    g[2 * step] = a * a * even_a + (b * b * even_b + u[5]);
  }
};

// Both sides: T x T^T for a matrix of registers, each of which x(i, j) gives and y(i, j, value) takes.
template <int from, int to, class T, class X, class Y>
DIFFKERN_FN void transform(T one_side, X x, Y y) {
  f32v columns[to][from];
#pragma GCC unroll 6
  for (int j = 0; j < from; ++j) {
    f32v x_j[from];
#pragma GCC unroll 6
    for (int i = 0; i < from; ++i) x_j[i] = x(i, j);
    one_side(x_j, &columns[0][j], from);
  }
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i) {
    f32v y_i[to];
    one_side(columns[i], y_i, 1);
#pragma GCC unroll 6
    for (int j = 0; j < to; ++j) y(i, j, y_i[j]);
  }
}

// V = B^T d B of a register of channels, from a tile's pixels, into rows of V `v_row` apart.
template <bool whole>
DIFFKERN_FN void transform_input(const float* const* d, int64_t channel, int count, float* v, int64_t v_row) {
  transform<kSize, kSize>(
      Transform::input,
      [&](int i, int j) __attribute__((always_inline)) {
        const float* pixel = d[i * kSize + j] + channel;
        return whole ? load(pixel) : load(pixel, count);
      },
      [&](int i, int j, f32v value) __attribute__((always_inline)) { store(v + (i * kSize + j) * v_row, value); });
}

}  // namespace

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
