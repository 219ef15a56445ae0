// Convolution with a packed weight, into given memory, on the CPU.

#include <algorithm>

#include "bindings/op.h"

namespace diffkern {
namespace {

// float32; with a weight of one term of bfloat16 that too.
void check_conv_dtype(const char* name, const Tensor& tensor, int terms) {
  const ScalarType dtype = tensor.scalar_type();
  const bool bf16 = terms == 1;
  check(dtype == ScalarType::Float || (bf16 && dtype == ScalarType::BFloat16), name, ": expected float32",
        bf16 ? " or bfloat16" : "", ", got ", show(dtype));
}

ConvParams conv2d_params(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& packed,
                         int64_t in_channels, int64_t out_channels, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& add, const std::optional<Tensor>& residual, int64_t stride,
                         int64_t padding, bool upsample) {
  const bool bf16 = packed.scalar_type() == ScalarType::BFloat16, blocked = x.dim() == 6;
  check(packed.dim() == (bf16 ? 8 : 4), "packed: expected ",
        bf16 ? "[column blocks, blocks of C, matrices, terms, 2, 16, 16, 2]"
             : "[matrices, column blocks, C, column block]",
        ", got shape ", show(sizes_of(packed)));
  check(!bf16 || (packed.size(3) >= 1 && packed.size(3) <= kMaxTerms), "packed: expected 1 to ", kMaxTerms,
        " terms, got ", bf16 ? packed.size(3) : 0);
  const int terms = bf16 ? int(packed.size(3)) : 0;
  if (!blocked || !bf16) check_conv_dtype("x", x, terms);
  if (blocked)
    check_blocked("x", x, terms);
  else
    check_channels_last("x", x);
  check(x.size(1) > 0, "x: expected at least one channel, got shape ", show(sizes_of(x)));
  const int64_t samples = x.size(0);
  const int64_t height = blocked ? x.size(3) - 2 : x.size(2), width = blocked ? x.size(4) - 2 : x.size(3);
  check(!(blocked && skip), "skip: expected none beside a blocked x");
  if (skip) check_image("skip", *skip, x, {samples, skip->dim() == 4 ? skip->size(1) : 0, height, width});
  ConvParams params{};
  params.channels[0] = x.size(1) * (blocked ? kDepthBlock : 1);
  params.channels[1] = skip ? skip->size(1) : 0;
  if (skip)
    check(params.depth() == in_channels, "x, skip: expected ", in_channels, " channels together, got ",
          params.channels[0], " and ", params.channels[1]);
  else
    check(params.depth() == in_channels, "x: expected ", in_channels, " channels, got ", params.channels[0]);

  params.terms = terms;
  params.taps = !bf16 && packed.size(3) == kTapColumns;
  params.matrices = params.taps ? 36 : packed.size(bf16 ? 2 : 0);
  check(params.matrices == 1 || params.matrices == 9 || params.matrices == (bf16 ? 4 : 36), "packed: expected 1, 9 or ",
        bf16 ? 4 : 36, " matrices, got ", params.matrices);
  const int64_t side = params.matrices == 1 ? 1 : 3;
  check(stride > 0, "stride: expected a value > 0, got ", stride);
  check(!params.winograd() || (stride == 1 && padding == 1), "stride, padding: expected 1 and 1 with ",
        params.matrices, " matrices, got ", stride, " and ", padding);
  check(padding >= 0 && padding < side, "padding: expected a value in [0, ", side, "), got ", padding);
  check(params.quarters() == 1 || (upsample && stride == 1 && padding == 1),
        "upsample, stride, padding: expected True, 1 and 1 with 4 matrices, got ", upsample ? "True, " : "False, ",
        stride, " and ", padding);
  const int64_t scale = upsample ? 2 : 1;
  params.stride = std::min(stride, std::max({int64_t(1), scale * height, scale * width}));  // more would change nothing
  const auto out_size = [&](int64_t size) { return divide_up(scale * size, params.stride); };
  params.out_height = out_size(height);
  params.out_width = out_size(width);
  params.out_channels = out_channels;
  const Sizes out_shape = {samples, out_channels, params.out_height, params.out_width};
  check_device("y", y, x);
  check_conv_dtype("y", y, terms);
  check_image("y", y, y, out_shape);
  const int64_t column_block = params.winograd() ? kWinogradColumns : params.few_columns() ? 1 : kDirectColumns;
  check_device("packed", packed, x);
  if (bf16)
    check_shape("packed", packed,
                {params.panels(), params.depth_blocks(), params.matrices, terms, 2, kDepthBlock / 2, kPanel / 2, 2});
  else if (params.taps)
    check_like("packed", packed, x, {params.winograd_columns(), params.depth(), 9, kTapColumns});
  else
    check_like("packed", packed, x,
               {params.matrices, divide_up(out_channels, column_block), params.depth(), column_block});
  check_contiguous("packed", packed);
  if (bias) check_vector("bias", *bias, ScalarType::Float, out_channels, x);
  if (add) {
    check_shape("add", *add, {samples, out_channels});
    check_dtype("add", *add, ScalarType::Float);
    check_device("add", *add, x);
    check(add->stride(1) == 1 || add->size(1) < 2 || samples == 0,
          "add: expected the channels of a sample together, got strides ",
          show({add->strides().begin(), add->strides().end()}));
    params.add_stride = add->stride(0);
  }
  if (residual) check_image("residual", *residual, y, out_shape);
  check_apart("y", y, "x", x);
  check_apart("y", y, "skip", skip);
  check_apart("y", y, "packed", packed);
  check_apart("y", y, "bias", bias);
  check_apart("y", y, "add", add);
  check_apart("y", y, "residual", residual, true);

  params.x[0] = memory<const void>("x", x);
  params.x[1] = skip ? memory<const void>("skip", *skip) : nullptr;
  params.x_dtype = dtype_of("x", x.scalar_type());
  params.weight = memory<const void>("packed", packed);
  params.bias = bias ? memory<const float>("bias", *bias) : nullptr;
  params.add = add ? memory<const float>("add", *add) : nullptr;
  params.residual = residual ? memory<const void>("residual", *residual) : nullptr;
  params.y = memory<void>("y", y);
  params.y_dtype = dtype_of("y", y.scalar_type());
  params.samples = samples;
  params.height = height;
  params.width = width;
  params.padding = padding;
  params.upsample = upsample;
  params.blocked = blocked;
  if (bf16 && params.matrices == 1 && stride == 1 && !upsample && !blocked) {  // which knows no rows
    params.width = params.out_width = height * width;
    params.height = params.out_height = 1;
  }
  return params;
}

// packed: a weight [out_channels, in_channels, ...]. Its shape gives the counts up to whole blocks only.
void conv2d_out(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& packed,
                int64_t in_channels, int64_t out_channels, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& add, const std::optional<Tensor>& residual, int64_t stride,
                int64_t padding, bool upsample) {
  const ConvParams params = conv2d_params(y, x, skip, packed, in_channels, out_channels, bias, add, residual, stride,
                                          padding, upsample);
  if (y.numel() == 0) return;
  const auto& kernels = cpu::level().kernels;
  if (packed.scalar_type() == ScalarType::BFloat16) {
    const ConvBlocks blocks(params);
    return run_cpu(params, kernels.conv_bf16, blocks.items(),
                   grain(params.matrices * params.depth() * kBlockTiles * kTilePixels * blocks.panels * kPanel));
  }
  if (params.winograd())
    return run_cpu(params, params.taps ? kernels.conv_winograd_taps : kernels.conv_winograd, params.winograd_items(),
                   grain(params.matrices * params.depth() * params.winograd_tiles() * params.winograd_column()));
  run_cpu(params, kernels.conv_direct, params.direct_items(),
          grain(params.matrices * params.depth() * params.direct_pixels() * kDirectColumns));
}

DIFFKERN_CPU_OP(conv2d_out,
                "(Tensor(a!) y, Tensor x, Tensor? skip, Tensor packed, int in_channels, int out_channels, Tensor? bias, "
                "Tensor? add, Tensor? residual, int stride, int padding, bool upsample) -> ()")

Tensor expand_taps(const Tensor& taps) {
  check(taps.dim() == 4 && taps.size(2) == 9 && taps.size(3) == kTapColumns, "taps: expected [column blocks, C, 9, ",
        kTapColumns, "], got shape ", show(sizes_of(taps)));
  check_dtype("taps", taps, ScalarType::Float);
  check_contiguous("taps", taps);
  const int64_t blocks = taps.size(0), channels = taps.size(1);
  const int64_t column_blocks = divide_up(blocks * kTapColumns, kWinogradColumns);
  Tensor matrices = empty_of({36, column_blocks, channels, kWinogradColumns}, ScalarType::Float, taps);
  torch::stable::zero_(matrices);
  const ExpandTapsParams params{memory<const float>("taps", taps), memory<float>("matrices", matrices), channels, blocks,
                                column_blocks};
  run_cpu(params, cpu::level().kernels.expand_taps, params.items(), 1);
  return matrices;
}

DIFFKERN_CPU_OP(expand_taps, "(Tensor taps) -> Tensor")

}  // namespace
}  // namespace diffkern
