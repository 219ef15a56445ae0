// The parameters of abs_quantile.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "ops/reverse_step/params.h"

namespace diffkern {

struct AbsQuantileParams {
  ReverseStepParams step;  // what x0_hat is made of
  double q;                // in [0, 1]
  float* quantile;         // [N]
};

namespace cuda {
const char* abs_quantile(const AbsQuantileParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
