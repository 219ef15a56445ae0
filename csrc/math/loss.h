// The term of the variational bound (Ho et al. 2020, eq. 5) that an element adds, by a row of coefficients
// (math/loss_row.h), and the gradient of a sample's losses.

#pragma once

#include "exp.h"
#include "gaussian_bin.h"
#include "lanes/lanes.h"
#include "loss_row.h"

namespace diffkern {

// A learned ln of p's variance, less the least one (Nichol & Dhariwal 2021, eq. 15).
template <class F>
DIFFKERN_FN F learned_log_var(const LossRow& row, F second_half) {
  return ((second_half + 1.0f) * 0.5f) * (row.log_var_max - row.log_var_min);
}

// The term of an x0_hat, where ln of p's variance is base + above.
template <class F>
DIFFKERN_FN BoundTerm<F> term_of(const LossRow& row, F x_0, F x0_hat, float base, F above) {
  constexpr float kLn2Pi = 0x1.d67f1cp+0f;
  const F log_var = above + base;
  if (row.first == kBin) return bin_term<F>(x_0, x0_hat, log_var);
  const F away = row.c1 * (x_0 - x0_hat), pull = away * exp<F>(-log_var), square = away * pull;
  const F by_mean = -(row.c1 * pull);
  if (row.first == kDensity) return {((log_var + kLn2Pi) + square) * 0.5f, by_mean, (F{} + 1.0f - square) * 0.5f};
  const F ratio = (F{} + (row.log_var_q - base)) - above, curve = exp_above_tangent<F>(ratio);
  return {(curve + square) * 0.5f, by_mean, ((curve + ratio) + square) * -0.5f};
}

// The term of an output o. Its slope by x0_hat is 0 where that is clamped.
template <class F>
DIFFKERN_FN BoundTerm<F> bound_term(const LossRow& row, bool clip, F x_0, F eps, F o, float base, F above) {
  const F x_t = row.a * x_0 + row.s * eps, mean = row.p_x * x_t + row.p_o * o;
  if (!clip) return term_of<F>(row, x_0, mean, base, above);
  const F one = F{} + 1.0f;
  BoundTerm<F> term = term_of<F>(row, x_0, min(one, max(-one, mean)), base, above);
  term.by_mean = mean > 1.0f ? F{} : term.by_mean;
  term.by_mean = mean < -1.0f ? F{} : term.by_mean;
  return term;
}

// The gradient of a sample's losses, from an element's error and its term:
//   by o                of_error (o - its target), and of_mean by_mean unless the bound trains the variance alone
//   by the second half  of_log_var by_log_var
struct LossSlopes {
  float of_error, of_mean, of_log_var;
};

constexpr double kBitsPerNat = 0x1.71547652b82fep+0;

// grad: [1] or, with `bound`, [2]
DIFFKERN_FN LossSlopes loss_slopes(const LossRow& row, int64_t elements, float weight, bool bound, const float* grad) {
  const double of_bits = bound ? kBitsPerNat / double(elements) * grad[1] : 0;
  return {float(2.0 / double(elements) * row.weight * weight * grad[0]), float(of_bits * row.p_o),
          float(of_bits * 0.5 * (double(row.log_var_max) - row.log_var_min))};
}

}  // namespace diffkern
