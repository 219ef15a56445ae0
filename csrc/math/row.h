// A row of the table that says what a sampler does in one step (diffkern/samplers.py makes it, math/update.h applies it).

#pragma once

namespace diffkern {

struct Row {
  float p_x, p_o;                  // x0_hat from x and the network's output o
  float k_x, k_o, k_0;             // x_next from x, o and x0_hat
  float sigma;                     // and from z
  float log_var_min, log_var_max;  // learned variance: between these, and sigma is 0 or 1
  float t;                         // the time step that is left: the noise's counter
  // the history's coefficients follow
};
constexpr int kRowColumns = sizeof(Row) / sizeof(float);

}  // namespace diffkern
