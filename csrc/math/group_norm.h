// y = silu(norm(x) (1 + scale) + shift) of one channel (Wu & He 2018) and its gradient. The CPU computes a channel's
// coefficients in double, a CUDA thread in float.

#pragma once

#include "silu.h"

namespace diffkern {

// R is double or float.
template <class R>
DIFFKERN_FN void modulate(R& weight, R& bias, float scale, float shift) {
  weight *= R(1) + scale;
  bias = bias * (R(1) + scale) + shift;
}

// z = (x - center) slope + offset, the argument of silu
struct Affine {
  float center, slope, offset;
};

// mean and rstd are the group's, of x + added. The offset makes up for the rounding of the center.
template <class R>
DIFFKERN_FN Affine affine(R weight, R bias, double mean, double added, R rstd) {
  const double center = mean - added;
  const R slope = rstd * weight;
  return {float(center), float(slope), float(bias + R(double(float(center)) - center) * slope)};
}

template <class F>
DIFFKERN_FN F normalised(F distance, F slope, F offset) {  // distance: x - center
  return multiply_add(distance, slope, offset);
}

// With xhat = (x + added - mean) rstd and m(.) the mean over the group's elements:
// grad_x = rstd (w grad_z - m(w grad_z) - xhat m(w grad_z xhat)), w rstd being the slope.
// by_distance = -rstd rstd m(w grad_z xhat), constant = -rstd m(w grad_z)
template <class F>
DIFFKERN_FN F input_gradient(F grad_z, F distance, F slope, F by_distance, F constant) {
  return multiply_add(slope, grad_z, multiply_add(by_distance, distance, constant));
}

}  // namespace diffkern
