// The parameters of q_sample.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
struct QSampleParams {
  View x_0, x_t, eps;  // eps may be null
  int64_t samples, elements;
  const int64_t* seeds;  // [N]
  const int64_t* t;      // [N], or [1] with a stride of 0
  int64_t t_stride;
  const int64_t* address;  // the noise's step: [N] or [1] too, or null where it is t
  int64_t address_stride;
  const float* table;  // [T, 2]: sqrt(alpha_bar), sqrt(1 - alpha_bar)
  int64_t rows;        // T
};

namespace cuda {
const char* q_sample(const QSampleParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
