// The samples of a tensor, as elementwise kernels see them.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "integers.h"

namespace diffkern {

constexpr int kMaxDims = 5;

// A batch of samples: element i of sample n, in the logical (C, H, W) order, whatever the memory format.
// Dimensions that lie together are merged, so a contiguous sample has one dimension of stride 1.
struct View {
  void* data;  // null: not there
  DType dtype;
  int32_t dims;
  int64_t batch_stride;
  int64_t sizes[kMaxDims], strides[kMaxDims];  // of one sample, outermost first

  bool contiguous() const { return dims == 1 && strides[0] == 1; }
};

// Work on elements is cut into chunks of one sample.
constexpr int64_t kChunk = 1024;
inline constexpr int64_t chunks(int64_t elements) { return divide_up(elements, kChunk); }

}  // namespace diffkern
