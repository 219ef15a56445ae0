// The launchers of the CUDA kernels. Each enqueues its kernels on the stream and returns null, or the error's text.

#pragma once

#include "../ops.h"

namespace diffkern::cuda {

using Stream = void*;  // a cudaStream_t

const char* noise(const NoiseParams&, Stream);
const char* q_sample(const QSampleParams&, Stream);
const char* reverse_step(const ReverseStepParams&, Stream);
const char* noise_loss(const NoiseLossParams&, Stream);
const char* noise_loss_backward(const NoiseLossParams&, Stream);
const char* attention(const AttentionParams&, Stream);
const char* attention_backward(const AttentionParams&, Stream);
const char* group_norm_silu(const GroupNormSiluParams&, Stream);
const char* group_norm_silu_backward(const GroupNormSiluParams&, Stream);

}  // namespace diffkern::cuda
