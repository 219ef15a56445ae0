// The parameters of group_norm_silu and of its gradient.

#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "dtype.h"
#include "integers.h"

namespace diffkern {

// y = silu(norm(x + add) (1 + scale) + shift) + residual. All tensors of the shape of x have its dtype and layout, but
// a blocked y, which CPUs write for conv_bf16 (cpu/layout_bf16.h).
struct GroupNormSiluParams {
  const void* x;         // [N, C, H, W], contiguous or channels_last
  const void* skip;       // null, or [N, skip_channels, H, W]: the last of the C channels, which x then lacks; forward
  int64_t skip_channels;  // on the CPU, in channels_last memory
  const void* residual;  // [N, C, H, W] or null
  void* y;               // [N, C, H, W]
  DType dtype;
  bool channels_last, silu;
  int64_t blocked_width;                      // W if y is blocked, or 0
  int terms;                                  // of bfloat16 in a blocked y, or 0
  int64_t samples, channels, groups, pixels;  // N, C, G, H W
  float eps;
  const float* weight;       // [C]
  const float* bias;         // [C]
  const float* scale_shift;  // [N, 2, C] or null
  const float* add;          // [N, C] or null
  float* mean;               // [N, G], of x + add; null on the CPU if it need not be known
  float* rstd;               // [N, G]
  // Backward only. z, the argument of silu, is xhat a channel's slope plus its offset, xhat = (x + add - mean) rstd.
  const void* grad_y;  // [N, C, H, W]
  void* grad_x;        // [N, C, H, W]
  float* grad_offset;  // [N, C]: sum over the pixels of grad_z
  float* grad_slope;   // [N, C]: sum over the pixels of grad_z xhat
  // CUDA only, for images that are more than one block's work (plan.h).
  double* partial_moments;  // [N, G, chunks, 2]: a chunk's mean and its sum of squared distances from that
  float* partial_sums;      // [N, chunks, 2, C]: a chunk's grad_offset, and its grad_slope / rstd

  // The CPU's work items: blocks of whole groups that fill whole registers, of 64 channels or a few more.
  int64_t groups_per_block() const {
    const int64_t width = channels / groups;
    int64_t step = 1;
    while (step * width % 16 != 0) step *= 2;
    return divide_up(64, step * width) * step;
  }
  int64_t blocks() const { return divide_up(groups, groups_per_block()); }  // a sample
};
constexpr int64_t kMaxGroupsPerBlock = 64;

namespace cuda {
const char* group_norm_silu(const GroupNormSiluParams&, Stream);
const char* group_norm_silu_backward(const GroupNormSiluParams&, Stream);
}  // namespace cuda

}  // namespace diffkern
