// Group norm with what surrounds it, into given memory too, and its gradient.

#include <algorithm>

#include "bindings/op.h"
#include "plan.h"

namespace diffkern {
namespace {

using torch::headeronly::MemoryFormat;

// The dense layout that an image is taken in, and its results have: its own, or contiguous.
MemoryFormat layout_of(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != stride) return MemoryFormat::Contiguous;
    stride *= x.size(d);
  }
  return MemoryFormat::ChannelsLast;
}

Tensor as_layout(const char* name, const Tensor& x, MemoryFormat layout) {
  check_memory(name, x);
  return x.is_contiguous() && layout == MemoryFormat::Contiguous ? x : torch::stable::contiguous(x, layout);
}

const float* check_coefficients(const char* name, const std::optional<Tensor>& tensor, const Sizes& shape,
                                const Tensor& like) {
  if (!tensor) return nullptr;
  check_shape(name, *tensor, shape);
  check_dtype(name, *tensor, ScalarType::Float);
  check_device(name, *tensor, like);
  check(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  return memory<const float>(name, *tensor);
}

// x is as_layout already, and there may be further channels in skip.
GroupNormSiluParams group_norm_silu_params(const Tensor& x, MemoryFormat layout, const Tensor& weight,
                                           const Tensor& bias, int64_t groups, const std::optional<Tensor>& scale_shift,
                                           const std::optional<Tensor>& add, bool silu, int64_t skip_channels = 0) {
  check_samples("x", x, true);
  const int64_t samples = x.size(0), channels = x.size(1) + skip_channels;
  check(channels > 0, "x: expected at least one channel, got shape ", show(sizes_of(x)));
  check(groups > 0 && channels % groups == 0, "groups: expected a divisor of the ", channels, " channels, got ",
        groups);
  GroupNormSiluParams params{};
  params.x = memory<const void>("x", x);
  params.dtype = dtype_of("x", x.scalar_type());
  params.channels_last = layout == MemoryFormat::ChannelsLast;
  params.silu = silu;
  params.samples = samples;
  params.channels = channels;
  params.groups = groups;
  params.pixels = elements_of(x) / x.size(1);
  check(!on_cuda(x) || channels / groups <= cuda::GroupNormPlan::kMaxWidth, "groups: expected at most ",
        cuda::GroupNormPlan::kMaxWidth, " channels each on CUDA, got ", channels / groups);
  params.weight = check_coefficients("weight", weight, {channels}, x);
  params.bias = check_coefficients("bias", bias, {channels}, x);
  params.scale_shift = check_coefficients("scale_shift", scale_shift, {samples, 2 * channels}, x);
  params.add = check_coefficients("add", add, {samples, channels}, x);
  return params;
}

constexpr int64_t kGroupNormGrain = 16384;  // elements a thread must have to be worth waking

void run_group_norm_silu(const Tensor& where, const GroupNormSiluParams& params, CpuKernel<GroupNormSiluParams> cpu,
                         CudaLauncher<GroupNormSiluParams> cuda) {
  if (on_cuda(where)) return run_cuda(where, params, cuda);
  const int64_t elements = params.channels * params.pixels / params.blocks();  // of a work item
  run_cpu(params, cpu, params.samples * params.blocks(), std::max(int64_t(1), kGroupNormGrain / elements));
}

// Room for the sums of the chunks that CUDA joins, so many of them for a chunk; none where one launch does it all.
std::optional<Tensor> empty_partial(const Tensor& x, const GroupNormSiluParams& params, int64_t sums,
                                    ScalarType dtype) {
  if (!on_cuda(x) || x.numel() == 0) return std::nullopt;
  const int64_t chunks = cuda::plan_group_norm(params).chunks;
  return chunks > 1 ? std::optional(empty_of({chunks * sums}, dtype, x)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   int64_t groups, double eps, const std::optional<Tensor>& scale_shift,
                                                   const std::optional<Tensor>& add,
                                                   const std::optional<Tensor>& residual, bool silu) {
  const MemoryFormat layout = layout_of(x);
  const Tensor dense = as_layout("x", x, layout);
  GroupNormSiluParams params = group_norm_silu_params(dense, layout, weight, bias, groups, scale_shift, add, silu);
  if (residual) check_like("residual", *residual, x, sizes_of(x));
  const Tensor added = residual ? as_layout("residual", *residual, layout) : dense;
  Tensor y = empty_as(dense);
  Tensor mean = empty_of({params.samples, groups}, ScalarType::Float, x);
  Tensor rstd = empty_of({params.samples, groups}, ScalarType::Float, x);
  params.eps = float(eps);
  params.residual = residual ? memory<const void>("residual", added) : nullptr;
  params.y = memory<void>("y", y);
  params.mean = memory<float>("mean", mean);
  params.rstd = memory<float>("rstd", rstd);
  const auto partial = empty_partial(x, params, 2 * params.samples * groups, ScalarType::Double);
  if (partial) params.partial_moments = memory<double>("partial", *partial);
  if (x.numel() > 0)
    run_group_norm_silu(x, params, cpu::level().kernels.group_norm_silu, DIFFKERN_CUDA_LAUNCHER(group_norm_silu));
  else
    for (Tensor statistic : {mean, rstd}) torch::stable::zero_(statistic);
  return {y, mean, rstd};
}

// y and x and skip, whose channels follow those of x, are of one dtype and channels_last, on the CPU; or y is blocked,
// of one term for bfloat16, of one or more for float32.
void group_norm_silu_out(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
                         const Tensor& bias, int64_t groups, double eps, const std::optional<Tensor>& scale_shift,
                         bool silu) {
  check_channels_last("x", x);
  const int64_t samples = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t skip_channels = skip && skip->dim() == 4 ? skip->size(1) : 0, channels = x.size(1) + skip_channels;
  if (skip) check_image("skip", *skip, x, {samples, skip_channels, height, width});
  const bool blocked = y.dim() == 6;
  const int most = x.scalar_type() == ScalarType::Float ? kMaxTerms : 1;
  const int terms = blocked ? int(std::clamp(y.size(2), int64_t(1), int64_t(most))) : 0;
  if (blocked) {
    check(x.scalar_type() != ScalarType::Half, "x: expected float32 or bfloat16 for a blocked y, got float16");
    check_shape("y", y, {samples, channels / kDepthBlock, terms, height + 2, width + 2, kDepthBlock});
    check_device("y", y, x);
    check_blocked("y", y, terms);
    check(x.size(1) % kDepthBlock == 0 && skip_channels % kDepthBlock == 0,
          "x, skip: expected whole blocks of 32 channels for a blocked y, got ", x.size(1), " and ", skip_channels);
  } else {
    check_image("y", y, x, {samples, channels, height, width});
  }
  GroupNormSiluParams params = group_norm_silu_params(x, MemoryFormat::ChannelsLast, weight, bias, groups, scale_shift,
                                                      std::nullopt, silu, skip_channels);
  check_apart("y", y, "x", x, !blocked);
  check_apart("y", y, "skip", skip);
  check_apart("y", y, "weight", weight);
  check_apart("y", y, "bias", bias);
  check_apart("y", y, "scale_shift", scale_shift);
  params.eps = float(eps);
  params.blocked_width = blocked ? width : 0;
  params.terms = terms;
  params.skip = skip ? memory<const void>("skip", *skip) : nullptr;
  params.skip_channels = skip_channels;
  params.y = memory<void>("y", y);
  if (y.numel() > 0) run_group_norm_silu(y, params, cpu::level().kernels.group_norm_silu, {});
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const Tensor& weight,
                                                            const Tensor& bias, int64_t groups,
                                                            const std::optional<Tensor>& scale_shift,
                                                            const std::optional<Tensor>& add, bool silu) {
  const MemoryFormat layout = layout_of(x);
  const Tensor dense = as_layout("x", x, layout);
  GroupNormSiluParams params = group_norm_silu_params(dense, layout, weight, bias, groups, scale_shift, add, silu);
  check_like("grad_y", grad_y, x, sizes_of(x));
  const Tensor dense_grad_y = as_layout("grad_y", grad_y, layout);
  Tensor grad_x = empty_as(dense);
  Tensor grad_offset = empty_of({params.samples, params.channels}, ScalarType::Float, x);
  Tensor grad_slope = empty_of({params.samples, params.channels}, ScalarType::Float, x);
  params.mean = const_cast<float*>(check_coefficients("mean", mean, {params.samples, groups}, x));
  params.rstd = const_cast<float*>(check_coefficients("rstd", rstd, {params.samples, groups}, x));
  params.grad_y = memory<const void>("grad_y", dense_grad_y);
  params.grad_x = memory<void>("grad_x", grad_x);
  params.grad_offset = memory<float>("grad_offset", grad_offset);
  params.grad_slope = memory<float>("grad_slope", grad_slope);
  const auto partial = empty_partial(x, params, 2 * params.samples * params.channels, ScalarType::Float);
  if (partial) params.partial_sums = memory<float>("partial", *partial);
  if (x.numel() > 0)
    run_group_norm_silu(x, params, cpu::level().kernels.group_norm_silu_backward,
                        DIFFKERN_CUDA_LAUNCHER(group_norm_silu_backward));
  else
    for (Tensor sum : {grad_offset, grad_slope}) torch::stable::zero_(sum);
  return {grad_x, grad_offset, grad_slope};
}

DIFFKERN_OP(group_norm_silu,
            "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? scale_shift, Tensor? add, Tensor? "
            "residual, bool silu) -> (Tensor, Tensor, Tensor)")
DIFFKERN_CPU_OP(group_norm_silu_out,
                "(Tensor(a!) y, Tensor x, Tensor? skip, Tensor weight, Tensor bias, int groups, float eps, Tensor? "
                "scale_shift, bool silu) -> ()")
DIFFKERN_OP(group_norm_silu_backward,
            "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, int groups, Tensor? "
            "scale_shift, Tensor? add, bool silu) -> (Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace diffkern
