// How an elementwise op's work is laid over a grid: x runs along a sample, y along the samples, both grid-stride.

#pragma once

#include <cstdint>

#include "view.h"

namespace diffkern::cuda {

struct Plan {
  uint32_t grid_x, grid_y, threads;
};

// vectors: what one thread does at a time, of one sample
inline Plan plan_elementwise(int64_t samples, int64_t vectors) {
  constexpr int64_t kThreads = 256, kMaxX = int64_t(1) << 20, kMaxY = 65535;
  const int64_t x = (vectors + kThreads - 1) / kThreads;
  return {uint32_t(x < kMaxX ? x : kMaxX), uint32_t(samples < kMaxY ? samples : kMaxY), uint32_t(kThreads)};
}

// Sums over the samples (diffusion_loss, moments): a block sums a chunk of a sample at a time.
constexpr Plan plan_sums(int64_t samples, int64_t elements) {
  constexpr int64_t kMax = 65535;
  return {uint32_t(chunks(elements) < kMax ? chunks(elements) : kMax), uint32_t(samples < kMax ? samples : kMax), 128};
}

}  // namespace diffkern::cuda
