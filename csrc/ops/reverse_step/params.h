// The parameters of reverse_step.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

constexpr int kMaxHistory = 4;

// x_next = k_x x + k_o o + k_0 x0_hat + sum_j k_j h_j + sigma z, x0_hat = p_x x + p_o o   (math/update.h)
struct ReverseStepParams {
  View x, out, x_next;
  View out_uncond, x0_hat;    // may be null
  View history[kMaxHistory];  // h_j
  int64_t history_count;
  int64_t samples, elements;
  const int64_t* seeds;  // [N]
  const float* table;    // [rows, columns]
  int64_t rows, columns;
  const int64_t* step;  // the row: [N], or [1] with a stride of 0
  int64_t step_stride;
  float guidance;
  bool clip, learned_variance;
};

namespace cuda {
const char* reverse_step(const ReverseStepParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
