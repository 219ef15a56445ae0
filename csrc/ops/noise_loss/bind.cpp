// The training loss with its noise made again, and its gradient.

#include "bindings/op.h"

namespace diffkern {
namespace {

NoiseLossParams noise_loss_params(const Tensor& out, const Tensor& seeds, const Tensor& t,
                                  const std::optional<Tensor>& weights) {
  check_samples("out", out);
  check(elements_of(out) > 0, "out: expected at least one element a sample, got shape ", show(sizes_of(out)));
  check_vector("seeds", seeds, ScalarType::Long, out.size(0), out);
  if (weights) check_vector("weights", *weights, ScalarType::Float, out.size(0), out);
  const Index index = index_of("t", t, out.size(0), int64_t(1) << 32, out);
  NoiseLossParams params{};
  params.out = view_of("out", out);
  params.samples = out.size(0);
  params.elements = elements_of(out);
  params.seeds = memory<const int64_t>("seeds", seeds);
  params.t = index.data;
  params.t_stride = index.stride;
  params.weights = weights ? memory<const float>("weights", *weights) : nullptr;
  return params;
}

Tensor noise_loss(const Tensor& out, const Tensor& seeds, const Tensor& t, const std::optional<Tensor>& weights) {
  NoiseLossParams params = noise_loss_params(out, seeds, t, weights);
  Tensor loss = empty_of({params.samples}, ScalarType::Float, out);
  Tensor partial = empty_of({params.samples, chunks(params.elements)}, ScalarType::Double, out);
  params.partial = memory<double>("partial", partial);
  params.loss = memory<float>("loss", loss);
  run_on_chunks(out, params, cpu::level().kernels.noise_loss_partial, DIFFKERN_CUDA_LAUNCHER(noise_loss));
  if (!on_cuda(out)) cpu::level().kernels.noise_loss_total(params, 0, params.samples);
  return loss;
}

Tensor noise_loss_backward(const Tensor& grad_loss, const Tensor& out, const Tensor& seeds, const Tensor& t,
                           const std::optional<Tensor>& weights) {
  NoiseLossParams params = noise_loss_params(out, seeds, t, weights);
  check_vector("grad_loss", grad_loss, ScalarType::Float, out.size(0), out);
  Tensor grad_out = empty_as(out);
  params.grad_loss = memory<const float>("grad_loss", grad_loss);
  params.grad_out = view_of("grad_out", grad_out);
  run_on_chunks(out, params, cpu::level().kernels.noise_loss_backward, DIFFKERN_CUDA_LAUNCHER(noise_loss_backward));
  return grad_out;
}

DIFFKERN_OP(noise_loss, "(Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor")
DIFFKERN_OP(noise_loss_backward, "(Tensor grad_loss, Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor")

}  // namespace
}  // namespace diffkern
