// A row of the table that says what is trained or measured at one step (diffkern/training/objectives.py makes it, math/loss.h
// applies it). o is the network's output, x_t = a x_0 + s eps its input.

#pragma once

#include <cstdint>

namespace diffkern {

struct LossRow {
  float a, s;
  float y_x, y_e;                  // the target of o: y_x x_0 + y_e eps
  float weight;                    // of the squared error
  float p_x, p_o;                  // x0_hat = p_x x_t + p_o o
  float c1;                        // the mean of q(x_prev | x_t, x_0) is c1 x_0 + c2 x_t
  float log_var_q;                 // ln of its variance
  float log_var_min, log_var_max;  // ln of that of p(x_prev | x_t): between these if it is learned, else the second
  float first;                     // what the bound's term is: one of those below
};
constexpr LossRow kNoiseRow{0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0};  // where there is no table: the target is eps
constexpr int64_t kLossColumns = sizeof(LossRow) / sizeof(float);

// KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)); at the first step, -ln p(x_0 | x_1) of the bin in which an image's level
// lies, or of the density there.
constexpr float kDivergence = 0, kBin = 1, kDensity = 2;

}  // namespace diffkern
