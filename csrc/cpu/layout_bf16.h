// The layout of the operands of bfloat16 products: constants that kernels, their parameters and the bindings share.
//
// A number may be the sum of several terms of bfloat16, each the nearest to what those before it leave.
// A blocked image is [N, C / 32, terms, H + 2, W + 2, 32] of bfloat16, with zeros around it.

#pragma once

#include <cstdint>

namespace diffkern {

constexpr int64_t kTilePixels = 16;  // rows of a tile: pixels of an image, or queries
constexpr int64_t kPanel = 32;       // columns of a panel of the weight
constexpr int64_t kDepthBlock = 32;  // channels that lie together, in the weight and in a blocked image
constexpr int kMaxTerms = 3;         // of a number: three are a float32

}  // namespace diffkern
