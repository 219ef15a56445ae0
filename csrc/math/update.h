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

// Clamped to [-limit, limit], which may be infinite; NaN stays NaN.
template <class F>
DIFFKERN_FN F predicted_x0(const Row& row, F x, F o, float limit) {
  const F x0 = row.p_x * x + row.p_o * o;
  return min(F(F{} + limit), max(F(F{} - limit), x0));
}

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

}  // namespace diffkern
