// Noise of a batch of samples (docs/noise.md).

#include "bindings/op.h"

namespace diffkern {
namespace {

Tensor noise(const Tensor& seeds, const Sizes& shape, const Tensor& step, int64_t stream, ScalarType dtype) {
  check(seeds.dim() == 1, "seeds: expected shape (N,), got ", show(sizes_of(seeds)));
  check_vector("seeds", seeds, ScalarType::Long, seeds.size(0), seeds);
  check(stream >= 0 && stream < int64_t(1) << 32, "stream: expected a value in [0, 2^32), got ", stream);
  for (int64_t size : shape) check(size >= 0, "shape: expected no negative size, got ", show(shape));
  const int64_t samples = seeds.size(0);
  const Index t = index_of("step", step, samples, int64_t(1) << 32, seeds);

  Sizes sizes = {samples};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  dtype_of("dtype", dtype);
  Tensor z = empty_of(sizes, dtype, seeds);
  const NoiseParams params{view_of("z", z), samples,  elements_of(z), memory<const int64_t>("seeds", seeds),
                           t.data,          t.stride, uint32_t(stream)};
  run_on_chunks(z, params, cpu::level().kernels.noise, DIFFKERN_CUDA_LAUNCHER(noise));
  return z;
}

DIFFKERN_OP(noise, "(Tensor seeds, SymInt[] shape, Tensor step, int stream, ScalarType dtype) -> Tensor")

}  // namespace
}  // namespace diffkern
