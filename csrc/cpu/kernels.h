// The CPU kernels: every one compiled for each level of instruction set, chosen when the module is loaded.
// A kernel does the work items [begin, end); any split of the items gives the same bits.

#pragma once

#include <vector>

#include "ops/abs_quantile/params.h"
#include "ops/attention/params.h"
#include "ops/conv2d/params.h"
#include "ops/conv3x3/params.h"
#include "ops/diffusion_loss/params.h"
#include "ops/group_norm_silu/params.h"
#include "ops/moments/params.h"
#include "ops/noise/params.h"
#include "ops/q_sample/params.h"
#include "ops/reverse_step/params.h"
#include "ops/word_hash/params.h"

// A new kernel is one line here, in the first list if it lies in a file that is compiled for the levels of bfloat16, too
// (CMakeLists.txt), and a function of this name in ops/.
#define DIFFKERN_BFLOAT16_KERNELS(X)      \
  X(attention_terms, AttentionParams)     \
  X(conv_bf16, ConvParams)                \
  X(group_norm_silu, GroupNormSiluParams)
#define DIFFKERN_CPU_KERNELS(X)                    \
  DIFFKERN_BFLOAT16_KERNELS(X)                     \
  X(abs_quantile, AbsQuantileParams)               \
  X(noise, NoiseParams)                            \
  X(q_sample, QSampleParams)                       \
  X(reverse_step, ReverseStepParams)               \
  X(diffusion_loss_partial, DiffusionLossParams)   \
  X(diffusion_loss_total, DiffusionLossParams)     \
  X(diffusion_loss_backward, DiffusionLossParams)  \
  X(moments_partial, MomentsParams)                \
  X(moments_total, MomentsParams)                  \
  X(group_norm_silu_backward, GroupNormSiluParams) \
  X(attention, AttentionParams)                    \
  X(attention_backward, AttentionParams)           \
  X(attention_sum_grad_q, AttentionParams)         \
  X(conv_winograd, ConvParams)                     \
  X(conv_winograd_taps, ConvParams)                \
  X(expand_taps, ExpandTapsParams)                 \
  X(conv_direct, ConvParams)                       \
  X(pack_taps, PackTapsParams)                     \
  X(conv3x3_gradient, Conv3x3GradientParams)       \
  X(conv3x3_sum_parts, Conv3x3GradientParams)      \
  X(word_hash, WordHashParams)

namespace diffkern::cpu {

struct Kernels {
#define DIFFKERN_MEMBER(name, Params) void (*name)(const Params&, int64_t begin, int64_t end);
  DIFFKERN_CPU_KERNELS(DIFFKERN_MEMBER)
#undef DIFFKERN_MEMBER
};

// The best level that this processor has, or the one that the environment's DIFFKERN_CPU_LEVEL names.
struct Level {
  const char* name;
  const char* error;  // null, or why that level cannot be used (the best one then is)
  Kernels kernels;
};
const Level& level();
std::vector<const char*> supported_levels();  // by this processor, the best first

#ifdef DIFFKERN_CPU_LEVEL
namespace DIFFKERN_CPU_LEVEL {
#define DIFFKERN_DECLARE(name, Params) void name(const Params&, int64_t begin, int64_t end);
DIFFKERN_CPU_KERNELS(DIFFKERN_DECLARE)
#undef DIFFKERN_DECLARE
}  // namespace DIFFKERN_CPU_LEVEL
#endif

}  // namespace diffkern::cpu
