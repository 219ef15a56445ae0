// The parameters of reverse_step.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

constexpr int kMaxHistory = 6;

// x_next = mean + sigma z, blended with what is known; mean is linear in x, out, x0_hat and history   (math/update.h)
struct ReverseStepParams {
  View x, x_next;
  View out, out_uncond;       // may be null, the former with long rows only (row.h)
  View kept;                  // may be null: x0_hat, or another combination
  View grad;                  // may be null: the gradient that guides
  View known, mask;           // both or neither; a mask may have strides of 0
  View history[kMaxHistory];  // h_j
  int64_t history_count;
  int64_t samples, elements;
  const int64_t* seeds;  // [N]
  const float* table;    // [rows, columns], at a multiple of 16 bytes if its rows are long
  int64_t rows, columns;
  const int64_t* address;  // [rows, 2]: address and count of a long row's noise; or null
  const int64_t* step;     // the row: [N], or [1] with a stride of 0
  int64_t step_stride;
  float guidance;  // of short rows, as clip is
  bool clip, learned_variance;
};

namespace cuda {
const char* reverse_step(const ReverseStepParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
