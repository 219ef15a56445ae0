// The parameters of noise.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

// z = the noise of (seed, step, stream)
struct NoiseParams {
  View z;
  int64_t samples, elements;  // N, C H W
  const int64_t* seeds;       // [N]
  const int64_t* step;        // [N], or [1] with a stride of 0
  int64_t step_stride;
  uint32_t stream;
};

namespace cuda {
const char* noise(const NoiseParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
