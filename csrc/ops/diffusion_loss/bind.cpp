// Training losses with their noise made again, and their gradients. noise_loss is the one whose only target is eps.

#include <cstring>

#include "bindings/op.h"

namespace diffkern {
namespace {

// The parameters that both ops have. `halves`: 2 if a sample of `out` has a second half.
DiffusionLossParams loss_params(const Tensor& out, int64_t halves, const Tensor& seeds,
                                const std::optional<Tensor>& weights) {
  check(elements_of(out) > 0, "out: expected at least one element a sample, got shape ", show(sizes_of(out)));
  check_vector("seeds", seeds, ScalarType::Long, out.size(0), out);
  if (weights) check_vector("weights", *weights, ScalarType::Float, out.size(0), out);
  DiffusionLossParams params{};
  params.out = view_of("out", out);
  params.samples = out.size(0);
  params.elements = elements_of(out) / halves;
  params.seeds = memory<const int64_t>("seeds", seeds);
  params.weights = weights ? memory<const float>("weights", *weights) : nullptr;
  return params;
}

DiffusionLossParams noise_loss_params(const Tensor& out, const Tensor& seeds, const Tensor& t,
                                      const std::optional<Tensor>& weights) {
  check_samples("out", out);
  DiffusionLossParams params = loss_params(out, 1, seeds, weights);
  const Index index = index_of("t", t, params.samples, int64_t(1) << 32, out);
  params.step = index.data;
  params.step_stride = index.stride;
  return params;
}

// On the CPU the rows that are used are looked at: without an x_0 it can be no part of the target.
void check_targets(const DiffusionLossParams& params) {
  for (int64_t n = 0; n < (params.step_stride ? params.samples : 1); ++n) {
    const int64_t number = params.step[n * params.step_stride];
    LossRow row;
    std::memcpy(&row, params.table + number * kLossColumns, sizeof row);
    check(row.y_x == 0, "x_0: expected a tensor where y_x of the table is not 0, got None");
  }
}

DiffusionLossParams diffusion_loss_params(const Tensor& out, const std::optional<Tensor>& x_0, const Tensor& seeds,
                                          const Tensor& step, const Tensor& table,
                                          const std::optional<Tensor>& address, const std::optional<Tensor>& weights,
                                          bool learned_variance, bool bound, bool stop_mean, bool clip) {
  check_samples("out", out, learned_variance);
  Sizes shape = sizes_of(out);
  if (learned_variance) {
    check(shape[1] % 2 == 0, "out: expected an even number of channels, got shape ", show(shape));
    shape[1] /= 2;
  }
  DiffusionLossParams params = loss_params(out, learned_variance ? 2 : 1, seeds, weights);
  if (x_0) {
    check_shape("x_0", *x_0, shape);
    if (x_0->scalar_type() != ScalarType::Float) check_dtype("x_0", *x_0, out.scalar_type());
    check_device("x_0", *x_0, out);
    params.x_0 = view_of("x_0", *x_0);
  }
  check(x_0 || !bound, "x_0: expected a tensor with bound=True, got None");
  check(table.dim() == 2 && table.size(1) == kLossColumns, "table: expected shape (rows, ", kLossColumns, "), got ",
        show(sizes_of(table)));
  check_dtype("table", table, ScalarType::Float);
  check_device("table", table, out);
  check_contiguous("table", table);
  const Index row = index_of("step", step, params.samples, table.size(0), out);
  params.step = row.data;
  params.step_stride = row.stride;
  params.table = memory<const float>("table", table);
  params.rows = table.size(0);
  if (address) {
    const Index index = index_of("address", *address, params.samples, int64_t(1) << 32, out);
    params.address = index.data;
    params.address_stride = index.stride;
  }
  params.learned_variance = learned_variance;
  params.bound = bound;
  params.stop_mean = stop_mean;
  params.clip = clip;
  if (!x_0 && !on_cuda(out)) check_targets(params);
  return params;
}

Tensor losses(const Tensor& out, DiffusionLossParams params) {
  Sizes shape{params.samples};
  if (params.bound) shape.push_back(2);
  Tensor loss = empty_of(shape, ScalarType::Float, out);
  shape.insert(shape.begin() + 1, chunks(params.elements));
  Tensor partial = empty_of(shape, ScalarType::Double, out);
  params.partial = memory<double>("partial", partial);
  params.loss = memory<float>("loss", loss);
  run_on_chunks(out, params, cpu::level().kernels.diffusion_loss_partial, DIFFKERN_CUDA_LAUNCHER(diffusion_loss));
  if (!on_cuda(out)) cpu::level().kernels.diffusion_loss_total(params, 0, params.samples);
  return loss;
}

Tensor gradient(const Tensor& grad_loss, const Tensor& out, DiffusionLossParams params) {
  check_shape("grad_loss", grad_loss, params.bound ? Sizes{params.samples, 2} : Sizes{params.samples});
  check_dtype("grad_loss", grad_loss, ScalarType::Float);
  check_device("grad_loss", grad_loss, out);
  check_contiguous("grad_loss", grad_loss);
  Tensor grad_out = empty_as(out);
  params.grad_loss = memory<const float>("grad_loss", grad_loss);
  params.grad_out = view_of("grad_out", grad_out);
  run_on_chunks(out, params, cpu::level().kernels.diffusion_loss_backward,
                DIFFKERN_CUDA_LAUNCHER(diffusion_loss_backward));
  return grad_out;
}

Tensor noise_loss(const Tensor& out, const Tensor& seeds, const Tensor& t, const std::optional<Tensor>& weights) {
  return losses(out, noise_loss_params(out, seeds, t, weights));
}

Tensor noise_loss_backward(const Tensor& grad_loss, const Tensor& out, const Tensor& seeds, const Tensor& t,
                           const std::optional<Tensor>& weights) {
  return gradient(grad_loss, out, noise_loss_params(out, seeds, t, weights));
}

Tensor diffusion_loss(const Tensor& out, const std::optional<Tensor>& x_0, const Tensor& seeds, const Tensor& step,
                      const Tensor& table, const std::optional<Tensor>& address, const std::optional<Tensor>& weights,
                      bool learned_variance, bool bound, bool stop_mean, bool clip) {
  return losses(out, diffusion_loss_params(out, x_0, seeds, step, table, address, weights, learned_variance, bound,
                                           stop_mean, clip));
}

Tensor diffusion_loss_backward(const Tensor& grad_loss, const Tensor& out, const std::optional<Tensor>& x_0,
                               const Tensor& seeds, const Tensor& step, const Tensor& table,
                               const std::optional<Tensor>& address, const std::optional<Tensor>& weights,
                               bool learned_variance, bool bound, bool stop_mean, bool clip) {
  return gradient(grad_loss, out,
                  diffusion_loss_params(out, x_0, seeds, step, table, address, weights, learned_variance, bound,
                                        stop_mean, clip));
}

#define DIFFKERN_LOSS_ARGUMENTS                                                                                       \
  "Tensor out, Tensor? x_0, Tensor seeds, Tensor step, Tensor table, Tensor? address, Tensor? weights, "              \
  "bool learned_variance, bool bound, bool stop_mean, bool clip"

DIFFKERN_OP(diffusion_loss, "(" DIFFKERN_LOSS_ARGUMENTS ") -> Tensor")
DIFFKERN_OP(diffusion_loss_backward, "(Tensor grad_loss, " DIFFKERN_LOSS_ARGUMENTS ") -> Tensor")
DIFFKERN_OP(noise_loss, "(Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor")
DIFFKERN_OP(noise_loss_backward, "(Tensor grad_loss, Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor")

}  // namespace
}  // namespace diffkern
