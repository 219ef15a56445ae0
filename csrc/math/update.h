// One step of any sampler whose update is linear in what it holds: a row of coefficients, made in diffkern/samplers.py.
// Ancestral (Ho et al. 2020, Algorithm 2) and DDIM (Song et al. 2021, eq. 12) are rows; so are the solvers after them.

#pragma once

#include "exp.h"
#include "lanes/lanes.h"
#include "row.h"

namespace diffkern {

// (Ho & Salimans 2022, eq. 6, in w = 1 + their w)
template <class F>
DIFFKERN_FN F guided(float guidance, F conditional, F unconditional) {
  return unconditional + guidance * (conditional - unconditional);
}

// Before it is clamped. The gradient's term is added where p_g is not 0.
template <class F>
DIFFKERN_FN F predicted_x0(const Row& row, F x, F o) {
  return row.p_x * x + row.p_o * o;
}

// To [-limit, limit], which may be infinite; NaN stays NaN.
template <class F>
DIFFKERN_FN F clamped(F x0, float limit) {
  return min(F(F{} + limit), max(F(F{} - limit), x0));
}

template <class F>
DIFFKERN_FN F kept(const Row& row, F x, F o, F x0) {
  const F last = row.q_0 * x0;
  return row.q_x == 0 && row.q_o == 0 ? last : (row.q_x * x + row.q_o * o) + last;
}

// The history, the terms of out_uncond and of the gradient, and the noise follow, in this order.
template <class F>
DIFFKERN_FN F next_mean(const Row& row, F x, F o, F x0) {
  return (row.k_x * x + row.k_o * o) + row.k_0 * x0;
}

// (Nichol & Dhariwal 2021, eq. 15), v = (the network's second half + 1) / 2
template <class F>
DIFFKERN_FN F learned_sigma(const Row& row, F second_half) {
  F v = (second_half + 1.0f) * 0.5f;
  return row.sigma * exp<F>(0.5f * (row.log_var_min + v * (row.log_var_max - row.log_var_min)));
}

// The mean shifted by a classifier's gradient (Dhariwal & Nichol 2021, algorithm 1), of a learned variance sigma^2.
template <class F>
DIFFKERN_FN F learned_shift(const Row& row, F sigma, F gradient) {
  return (row.k_g * (sigma * sigma)) * gradient;
}

// x_next where the mask is 1, the known image at its noise level where it is 0 (Lugmayr et al. 2022, eq. 8).
template <class F>
DIFFKERN_FN F blended(F mask, F next, F known) {
  return mask * next + (1.0f - mask) * known;
}

}  // namespace diffkern
