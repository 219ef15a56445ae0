// Sums over each sample of two tensors and of their products.

#include "bindings/op.h"

namespace diffkern {
namespace {

Tensor moments(const Tensor& a, const Tensor& b) {
  check_samples("a", a);
  dtype_of("a", a.scalar_type());
  check_like("b", b, a, sizes_of(a));
  check(elements_of(a) > 0, "a: expected at least one element a sample, got shape ", show(sizes_of(a)));
  MomentsParams params{};
  params.a = view_of("a", a);
  params.b = view_of("b", b);
  params.samples = a.size(0);
  params.elements = elements_of(a);
  Tensor result = empty_of({params.samples, kMoments}, ScalarType::Double, a);
  Tensor partial = empty_of({params.samples, chunks(params.elements), kMoments}, ScalarType::Double, a);
  params.partial = memory<double>("partial", partial);
  params.moments = memory<double>("moments", result);
  run_on_chunks(a, params, cpu::level().kernels.moments_partial, DIFFKERN_CUDA_LAUNCHER(moments));
  if (!on_cuda(a)) cpu::level().kernels.moments_total(params, 0, params.samples);
  return result;
}

DIFFKERN_OP(moments, "(Tensor a, Tensor b) -> Tensor")

}  // namespace
}  // namespace diffkern
