// The parameters of noise_loss and of its gradient.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

// loss_n = weight_n mean (out - eps)^2
struct NoiseLossParams {
  View out;
  View grad_out;  // backward only
  int64_t samples, elements;
  const int64_t* seeds;    // [N]
  const int64_t* t;        // [N], or [1] with a stride of 0
  int64_t t_stride;
  const float* weights;    // [N] or null
  double* partial;         // [N, chunks], forward only
  float* loss;             // [N], forward only
  const float* grad_loss;  // [N], backward only
};

namespace cuda {
const char* noise_loss(const NoiseLossParams&, Stream);
const char* noise_loss_backward(const NoiseLossParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
