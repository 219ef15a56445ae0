// Forward noising, functional and in place.

#include "bindings/op.h"

namespace diffkern {
namespace {

void run_q_sample(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table,
                  const std::optional<Tensor>& address, const Tensor& x_t, const Tensor* eps) {
  check_samples("x_0", x_0);
  check(table.dim() == 2 && table.size(1) == 2, "table: expected shape (T, 2), got ", show(sizes_of(table)));
  check_dtype("table", table, ScalarType::Float);
  check_device("table", table, x_0);
  check_contiguous("table", table);
  check_vector("seeds", seeds, ScalarType::Long, x_0.size(0), x_0);
  const Index row = index_of("t", t, x_0.size(0), table.size(0), x_0);
  Index word{};
  if (address) word = index_of("address", *address, x_0.size(0), int64_t(1) << 32, x_0);

  const QSampleParams params{view_of("x_0", x_0),
                             view_of("x_t", x_t),
                             eps ? view_of("eps", *eps) : View{},
                             x_0.size(0),
                             elements_of(x_0),
                             memory<const int64_t>("seeds", seeds),
                             row.data,
                             row.stride,
                             word.data,
                             word.stride,
                             memory<const float>("table", table),
                             table.size(0)};
  run_on_chunks(x_0, params, cpu::level().kernels.q_sample, DIFFKERN_CUDA_LAUNCHER(q_sample));
}

std::tuple<Tensor, Tensor> q_sample(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table,
                                    const std::optional<Tensor>& address, bool return_eps) {
  Tensor x_t = empty_as(x_0);
  Tensor eps = return_eps ? empty_as(x_0) : absent(x_0);
  run_q_sample(x_0, t, seeds, table, address, x_t, return_eps ? &eps : nullptr);
  return {x_t, eps};
}

void q_sample_(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table,
               const std::optional<Tensor>& address) {
  check_writable("x_0", x_0);
  check_apart("x_0", x_0, "t", t);
  check_apart("x_0", x_0, "seeds", seeds);
  check_apart("x_0", x_0, "table", table);
  check_apart("x_0", x_0, "address", address);
  run_q_sample(x_0, t, seeds, table, address, x_0, nullptr);
}

DIFFKERN_OP(q_sample,
            "(Tensor x_0, Tensor t, Tensor seeds, Tensor table, Tensor? address, bool return_eps) -> (Tensor, Tensor)")
DIFFKERN_OP(q_sample_, "(Tensor(a!) x_0, Tensor t, Tensor seeds, Tensor table, Tensor? address) -> ()")

}  // namespace
}  // namespace diffkern
