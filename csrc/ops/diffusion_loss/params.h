// Every training loss: the squared error of the network's output and the term of the variational bound, with the noise
// made again instead of stored.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "math/loss_row.h"
#include "view.h"

namespace diffkern {

// loss_n = weights_n weight mean (o - y_x x_0 - y_e eps)^2 and, with `bound`, the bound's term in bits a dimension
struct DiffusionLossParams {
  View out;                   // [N, ...]; [N, 2C, ...] with learned_variance
  View x_0;                   // [N, ...]; null where only eps is a target
  View grad_out;              // like out; backward only
  int64_t samples, elements;  // N, those of x_0
  const int64_t* seeds;       // [N]
  const int64_t* step;        // the row: [N], or [1] with a stride of 0
  int64_t step_stride;
  const int64_t* address;  // the noise's step: [N] or [1] too, or null where it is `step`
  int64_t address_stride;
  const float* table;  // [rows, kLossColumns], or null: kNoiseRow at every step
  int64_t rows;
  const float* weights;  // [N] or null
  bool learned_variance, bound, stop_mean, clip;
  double* partial;         // [N, chunks, outputs]; forward only
  float* loss;             // [N, outputs]; forward only
  const float* grad_loss;  // [N, outputs]; backward only

  int64_t outputs() const { return bound ? 2 : 1; }
};

namespace cuda {
const char* diffusion_loss(const DiffusionLossParams&, Stream);
const char* diffusion_loss_backward(const DiffusionLossParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
