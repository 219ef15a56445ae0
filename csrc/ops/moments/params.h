// The parameters of moments.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "view.h"

namespace diffkern {

constexpr int kMoments = 5;  // sums of a, b, a^2, a b, b^2

struct MomentsParams {
  View a, b;
  int64_t samples, elements;
  double* partial;  // [N, chunks, kMoments]
  double* moments;  // [N, kMoments]
};

namespace cuda {
const char* moments(const MomentsParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
