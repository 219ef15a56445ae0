// The 3x3 convolution of training, differentiable, by Winograd's algorithm from weights as they are. On the CPU.

#include "bindings/op.h"

namespace diffkern {
namespace {

using torch::headeronly::MemoryFormat;

Tensor as_channels_last(const char* name, const Tensor& image) {
  check_memory(name, image);
  return torch::stable::contiguous(image, MemoryFormat::ChannelsLast);
}

// In channels_last memory.
Tensor empty_image(const Sizes& sizes, const Tensor& like) try {
  return made(torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                   MemoryFormat::ChannelsLast));
} catch (const std::runtime_error&) {
  throw_no_memory(sizes, like.scalar_type(), like);
}

void check_kernels(const Tensor& weight) {
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight: expected [K, C, 3, 3], got shape ",
        show(sizes_of(weight)));
  check_dtype("weight", weight, ScalarType::Float);
}

void check_conv3x3(const Tensor& x, const Tensor& weight) {
  check(x.dim() == 4, "x: expected [N, C, H, W], got shape ", show(sizes_of(x)));
  check_dtype("x", x, ScalarType::Float);
  check(x.size(1) > 0, "x: expected at least one channel, got shape ", show(sizes_of(x)));
  check_kernels(weight);
  check_like("weight", weight, x, {weight.size(0), x.size(1), 3, 3});
}

// The weight, which is channels_last, or the turned one (params.h).
PackTapsParams pack_params(const Tensor& weight, bool turned) {
  PackTapsParams params{};
  params.weight = memory<const float>("weight", weight);
  params.channels = weight.size(turned ? 0 : 1);
  params.out_channels = weight.size(turned ? 1 : 0);
  params.turned = turned;
  return params;
}

void run_pack(const PackTapsParams& params) {
  run_cpu(params, cpu::level().kernels.pack_taps, params.items(), grain(9 * PackTapsParams::kDepth * kTapColumns));
}

Tensor pack_taps(const Tensor& weight) {
  check_kernels(weight);
  const Tensor kernels = as_channels_last("weight", weight);
  PackTapsParams params = pack_params(kernels, false);
  Tensor taps = empty_of({params.column_blocks(), params.channels, 9, kTapColumns}, ScalarType::Float, weight);
  params.taps = memory<float>("taps", taps);
  run_pack(params);
  return taps;
}

// For packed weights, which are used at once. A thread keeps it: new megabytes would cost a page fault for each 4 KB.
Tensor kept_memory(int64_t elements, const Tensor& like) {
  thread_local std::optional<Tensor> kept;
  if (!kept || kept->numel() < elements) kept = empty_of({elements}, ScalarType::Float, like);
  return *kept;
}

// Up to so many it is faster to make Winograd's matrices where they are used than to write and read them.
constexpr int64_t kFewTiles = 128;

// y = conv(x, weight) + bias, or conv(x, turned weight); x is channels_last.
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool turned) {
  const Tensor kernels = as_channels_last("weight", weight);
  PackTapsParams pack = pack_params(kernels, turned);
  ConvParams params{};
  params.samples = x.size(0);
  params.height = params.out_height = x.size(2);
  params.width = params.out_width = x.size(3);
  params.channels[0] = x.size(1);
  params.out_channels = pack.out_channels;
  params.matrices = 36;
  params.stride = params.padding = 1;
  params.x_dtype = params.y_dtype = DType::f32;
  params.taps = params.tiles() <= kFewTiles;
  Tensor y = empty_image({params.samples, params.out_channels, params.height, params.width}, x);
  if (y.numel() == 0) return y;
  if (params.depth() == 0) return torch::stable::zero_(y);  // a weight without output channels, turned

  ExpandTapsParams expand{};
  expand.channels = pack.channels;
  expand.tap_blocks = pack.column_blocks();
  expand.column_blocks = (params.out_channels + kWinogradColumns - 1) / kWinogradColumns;
  const int64_t matrices = params.taps ? 0 : params.matrices * expand.column_blocks * pack.channels * kWinogradColumns;
  pack.taps = memory<float>("taps", kept_memory(pack.elements() + matrices, weight));
  run_pack(pack);
  params.weight = pack.taps;
  if (!params.taps) {
    expand.taps = pack.taps;
    params.weight = expand.matrices = pack.taps + pack.elements();
    run_cpu(expand, cpu::level().kernels.expand_taps, expand.items(), 1);
  }
  params.x[0] = memory<const void>("x", x);
  params.bias = bias ? memory<const float>("bias", *bias) : nullptr;
  params.y = memory<void>("y", y);
  const auto& level = cpu::level().kernels;
  run_cpu(params, params.taps ? level.conv_winograd_taps : level.conv_winograd, params.winograd_items(),
          grain(params.matrices * params.depth() * params.winograd_tiles() * params.winograd_column()));
  return y;
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_conv3x3(x, weight);
  if (bias) check_vector("bias", *bias, ScalarType::Float, weight.size(0), x);
  return convolve(as_channels_last("x", x), weight, bias, false);
}

// grad_y and x are channels_last.
Tensor weight_gradient(const Tensor& grad_y, const Tensor& x, const Tensor& weight) {
  Tensor grad_weight = empty_image(sizes_of(weight), weight);
  Conv3x3GradientParams params{};
  params.samples = x.size(0);
  params.height = x.size(2);
  params.width = x.size(3);
  params.channels = x.size(1);
  params.out_channels = weight.size(0);
  if (x.numel() == 0) torch::stable::zero_(grad_weight);
  if (x.numel() == 0 || weight.numel() == 0) return grad_weight;
  const int64_t count = params.part_count = params.enough_parts(), elements = weight.numel();
  Tensor parts = count > 1 ? empty_of({count, elements}, ScalarType::Float, weight) : grad_weight;
  params.x = memory<const float>("x", x);
  params.grad_y = memory<const float>("grad_y", grad_y);
  params.parts = memory<float>("parts", parts);
  params.grad_weight = memory<float>("grad_weight", grad_weight);
  const auto& kernels = cpu::level().kernels;
  run_cpu(params, kernels.conv3x3_gradient, params.blocks() * count,
          grain(36 * Conv3x3GradientParams::kChannels * Conv3x3GradientParams::kChannels * (params.tiles() / count + 1)));
  if (count > 1) run_cpu(params, kernels.conv3x3_sum_parts, chunks(elements), kChunkGrain);
  return grad_weight;
}

// grad_x and grad_weight, or nothing where it is not asked for.
std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, bool of_x,
                                            bool of_weight) {
  check_conv3x3(x, weight);
  check_like("grad_y", grad_y, x, {x.size(0), weight.size(0), x.size(2), x.size(3)});
  const Tensor dense = as_channels_last("grad_y", grad_y);
  return {of_x ? convolve(dense, weight, std::nullopt, true) : absent(x),
          of_weight ? weight_gradient(dense, as_channels_last("x", x), weight) : absent(x)};
}

DIFFKERN_CPU_OP(pack_taps, "(Tensor weight) -> Tensor")
DIFFKERN_CPU_OP(conv3x3, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
DIFFKERN_CPU_OP(conv3x3_backward,
                "(Tensor grad_y, Tensor x, Tensor weight, bool of_x, bool of_weight) -> (Tensor, Tensor)")

}  // namespace
}  // namespace diffkern
