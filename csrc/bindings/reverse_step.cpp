// One step of a sampler, functional and in place.

#include "../math/row.h"
#include "op.h"

namespace diffkern {
namespace {

// What is read may lie where the target lies, element by element, or apart from it.
void check_target(const char* target, const Tensor& written, const View& view, const Tensor& out,
                  const std::optional<Tensor>& out_uncond, const std::vector<Tensor>& history,
                  const ReverseStepParams& params) {
  const auto check_read = [&](const char* name, const Tensor& tensor, const View& read) {
    check(!overlap(view, read, params.samples) || same_place(written, tensor), name, ": expected the memory of ", target,
          " or other memory, got some of it");
  };
  check_read("out", out, params.out);
  if (out_uncond) check_read("out_uncond", *out_uncond, params.out_uncond);
  for (int j = 0; j < params.history_count; ++j) check_read("history", history[j], params.history[j]);
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
  if (&x_next == &x && params.samples * params.elements > 0) {
    check_target("x", x, params.x, out, out_uncond, history, params);
    if (x0_hat) {
      check_target("x0_hat", *x0_hat, params.x0_hat, out, out_uncond, history, params);
      check(!overlap(params.x0_hat, params.x, params.samples), "x0_hat: expected other memory than x's, got some of it");
    }
  }
  params.seeds = memory<const int64_t>(seeds);
  params.table = memory<const float>(table);
  params.rows = table.size(0);
  params.columns = columns;
  params.step = index.data;
  params.step_stride = index.stride;
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

void reverse_step_(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step, const Tensor& seeds,
                   const std::optional<Tensor>& out_uncond, double guidance, bool clip, bool learned_variance,
                   const std::vector<Tensor>& history, const std::optional<Tensor>& x0_hat) {
  check_writable("x", x);
  if (x0_hat) {
    check_like("x0_hat", *x0_hat, x, sizes_of(x));
    check_writable("x0_hat", *x0_hat);
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
