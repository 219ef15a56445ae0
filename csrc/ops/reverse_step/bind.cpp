// One step of a sampler, functional and in place.

#include <cstring>

#include "math/row.h"
#include "bindings/op.h"

namespace diffkern {
namespace {

// The noise of a row is that of its t: on the CPU it is looked at, in the rows that are used and draw noise.
void check_times(const Index& index, int64_t samples, const float* table, int64_t columns) {
  for (int64_t n = 0; n < (index.stride ? samples : 1); ++n) {
    const int64_t number = index.data[n * index.stride];
    Row row;
    std::memcpy(&row, table + number * columns, sizeof row);
    check(row.sigma == 0 || (row.t >= 0 && row.t < 0x1p32f), "table: expected t in [0, 2^32), got ", row.t, " in row ",
          number);
  }
}

void run_reverse_step(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step, const Tensor& seeds,
                      const std::optional<Tensor>& out_uncond, double guidance, bool clip, bool learned_variance,
                      const std::vector<Tensor>& history, const Tensor& x_next, const Tensor* x0_hat) {
  check_samples("x", x, learned_variance);
  dtype_of("x", x.scalar_type());
  Sizes out_shape = sizes_of(x);
  if (learned_variance) out_shape[1] *= 2;
  check_like("out", out, x, out_shape);
  if (out_uncond) check_like("out_uncond", *out_uncond, x, out_shape);
  for (const Tensor& h : history) check_like("history", h, x, sizes_of(x));
  check(history.size() <= size_t(kMaxHistory), "history: expected at most ", kMaxHistory, " tensors, got ",
        history.size());
  const int64_t columns = kRowColumns + int64_t(history.size());
  check(table.dim() == 2 && table.size(1) == columns, "table: expected shape (steps, ", columns, "), got ",
        show(sizes_of(table)));
  check_dtype("table", table, ScalarType::Float);
  check_device("table", table, x);
  check_contiguous("table", table);
  check_vector("seeds", seeds, ScalarType::Long, x.size(0), x);
  const Index index = index_of("step", step, x.size(0), table.size(0), x);

  ReverseStepParams params{};
  params.x = view_of("x", x);
  params.out = view_of("out", out);
  params.x_next = view_of("x_next", x_next);
  if (out_uncond) params.out_uncond = view_of("out_uncond", *out_uncond);
  if (x0_hat) params.x0_hat = view_of("x0_hat", *x0_hat);
  for (const Tensor& h : history) params.history[params.history_count++] = view_of("history", h);
  params.samples = x.size(0);
  params.elements = elements_of(x);
  params.seeds = memory<const int64_t>("seeds", seeds);
  params.table = memory<const float>("table", table);
  params.rows = table.size(0);
  params.columns = columns;
  params.step = index.data;
  params.step_stride = index.stride;
  if (!on_cuda(x)) check_times(index, params.samples, params.table, columns);
  params.guidance = float(guidance);
  params.clip = clip;
  params.learned_variance = learned_variance;
  run_on_chunks(x, params, cpu::level().kernels.reverse_step, DIFFKERN_CUDA_LAUNCHER(reverse_step));
}

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step,
                                        const Tensor& seeds, const std::optional<Tensor>& out_uncond, double guidance,
                                        bool clip, bool learned_variance, const std::vector<Tensor>& history,
                                        bool return_x0) {
  Tensor x_next = empty_as(x);
  Tensor x0_hat = return_x0 ? empty_as(x) : absent(x);
  run_reverse_step(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x_next,
                   return_x0 ? &x0_hat : nullptr);
  return {x_next, x0_hat};
}

// A target may lie where what is read element by element lies, or apart from it.
void check_target(const char* target, const Tensor& written, const Tensor& out, const Tensor& table, const Tensor& step,
                  const Tensor& seeds, const std::optional<Tensor>& out_uncond, const std::vector<Tensor>& history) {
  check_writable(target, written);
  check_apart(target, written, "out", out, true);
  check_apart(target, written, "out_uncond", out_uncond, true);
  for (const Tensor& h : history) check_apart(target, written, "history", h, true);
  check_apart(target, written, "table", table);
  check_apart(target, written, "step", step);
  check_apart(target, written, "seeds", seeds);
}

void reverse_step_(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step, const Tensor& seeds,
                   const std::optional<Tensor>& out_uncond, double guidance, bool clip, bool learned_variance,
                   const std::vector<Tensor>& history, const std::optional<Tensor>& x0_hat) {
  check_target("x", x, out, table, step, seeds, out_uncond, history);
  if (x0_hat) {
    check_like("x0_hat", *x0_hat, x, sizes_of(x));
    check_target("x0_hat", *x0_hat, out, table, step, seeds, out_uncond, history);
    check_apart("x", x, "x0_hat", *x0_hat);
  }
  run_reverse_step(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x,
                   x0_hat ? &*x0_hat : nullptr);
}

DIFFKERN_OP(reverse_step,
            "(Tensor x, Tensor out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, float guidance, bool "
            "clip, bool learned_variance, Tensor[] history, bool return_x0) -> (Tensor, Tensor)")
DIFFKERN_OP(reverse_step_,
            "(Tensor(a!) x, Tensor out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, float guidance, "
            "bool clip, bool learned_variance, Tensor[] history, Tensor(b!)? x0_hat) -> ()")

}  // namespace
}  // namespace diffkern
