// The quantile of |x0_hat| of each sample, by its row of the table.

#include "ops/reverse_step/operands.h"

namespace diffkern {
namespace {

Tensor abs_quantile(const Tensor& x, const OptionalTensor& out, const Tensor& table, const Tensor& step, double q,
                    const OptionalTensor& out_uncond, double guidance, const OptionalTensor& grad,
                    bool learned_variance) {
  const OptionalTensor none;
  const std::vector<Tensor> no_history;
  check(q >= 0 && q <= 1, "q: expected a number in [0, 1], got ", q);
  AbsQuantileParams params{};
  params.step = params_of({x, out, table, step, out_uncond, guidance, false, learned_variance, no_history, none, grad,
                           none, none, false});
  const int64_t elements = params.step.elements;
  check(elements > 0 && elements < int64_t(1) << 32, "x: expected 1 to 2^32 - 1 elements a sample, got shape ",
        show(sizes_of(x)));
  params.q = q;
  Tensor quantile = empty_of({x.size(0)}, ScalarType::Float, x);
  params.quantile = memory<float>("quantile", quantile);
  if (x.size(0) == 0) return quantile;
  if (on_cuda(x))
    run_cuda<AbsQuantileParams>(x, params, DIFFKERN_CUDA_LAUNCHER(abs_quantile));
  else
    run_cpu(params, cpu::level().kernels.abs_quantile, params.step.samples, 1);
  return quantile;
}

DIFFKERN_OP(abs_quantile,
            "(Tensor x, Tensor? out, Tensor table, Tensor step, float q, Tensor? out_uncond=None, float guidance=1.0, "
            "Tensor? grad=None, bool learned_variance=False) -> Tensor")

}  // namespace
}  // namespace diffkern
