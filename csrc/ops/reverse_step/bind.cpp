// One step of a sampler, functional and in place.

#include "operands.h"

namespace diffkern {
namespace {

// On the CPU, addresses are looked at: of the rows that are used and draw noise.
void check_addresses(const ReverseStepParams& p) {
  for (int64_t n = 0; n < (p.step_stride ? p.samples : 1); ++n) {
    const int64_t number = p.step[n * p.step_stride];
    const Row row = read_row(p, number);
    if ((row.sigma == 0 && row.b_z == 0) || row.has_address) continue;
    if (p.columns < kLongColumns)
      check(false, "table: expected t in [0, 2^32), got ", row.k_j[-1], " in row ", number);
    check(p.address, "address: expected a tensor, for row ", number, " draws noise, got None");
    check(false, "address: expected 1 <= count <= address + 1 and address < 2^32, got count ",
          p.address[2 * number + 1], " and address ", p.address[2 * number], " in row ", number);
  }
}

void run_reverse_step(const StepOperands& a, const Tensor& seeds, const Tensor& x_next, const char* kept_name,
                      const Tensor* kept) {
  ReverseStepParams params = params_of(a);
  check_vector("seeds", seeds, ScalarType::Long, a.x.size(0), a.x);
  params.x_next = view_of("x_next", x_next);
  if (kept) params.kept = view_of(kept_name, *kept);
  params.seeds = memory<const int64_t>("seeds", seeds);
  if (!on_cuda(a.x)) check_addresses(params);
  run_on_chunks(a.x, params, cpu::level().kernels.reverse_step, DIFFKERN_CUDA_LAUNCHER(reverse_step));
}

// The second result is what is kept: x0_hat with short rows.
std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const OptionalTensor& out, const Tensor& table,
                                        const Tensor& step, const Tensor& seeds, const OptionalTensor& out_uncond,
                                        double guidance, bool clip, bool learned_variance,
                                        const std::vector<Tensor>& history, bool return_kept,
                                        const OptionalTensor& address, const OptionalTensor& grad,
                                        const OptionalTensor& known, const OptionalTensor& mask) {
  Tensor x_next = empty_as(x);
  Tensor kept = return_kept ? empty_as(x) : absent(x);
  const StepOperands a{x,       out,     table, step,  out_uncond, guidance, clip, learned_variance,
                       history, address, grad,  known, mask};
  run_reverse_step(a, seeds, x_next, "kept", return_kept ? &kept : nullptr);
  return {x_next, kept};
}

// A target may lie where what is read element by element lies, or apart from it. The blend with what is known comes
// after the rest of a chunk is written.
void check_target(const char* target, const Tensor& written, const StepOperands& a, const Tensor& seeds) {
  check_writable(target, written);
  check_apart(target, written, "out", a.out, true);
  check_apart(target, written, "out_uncond", a.out_uncond, true);
  check_apart(target, written, "grad", a.grad, true);
  for (const Tensor& h : a.history) check_apart(target, written, "history", h, true);
  check_apart(target, written, "known", a.known);
  check_apart(target, written, "mask", a.mask);
  check_apart(target, written, "table", a.table);
  check_apart(target, written, "address", a.address);
  check_apart(target, written, "step", a.step);
  check_apart(target, written, "seeds", seeds);
}

void reverse_step_(const Tensor& x, const OptionalTensor& out, const Tensor& table, const Tensor& step,
                   const Tensor& seeds, const OptionalTensor& out_uncond, double guidance, bool clip,
                   bool learned_variance, const std::vector<Tensor>& history, const OptionalTensor& x0_hat,
                   const OptionalTensor& address, const OptionalTensor& grad, const OptionalTensor& known,
                   const OptionalTensor& mask, const OptionalTensor& kept) {
  const StepOperands a{x,       out,     table, step,  out_uncond, guidance, clip, learned_variance,
                       history, address, grad,  known, mask};
  if (a.long_rows())
    check_absent("x0_hat", x0_hat, "with long rows, which have kept");
  else
    check_absent("kept", kept, "with short rows, which have x0_hat");
  const OptionalTensor& target = a.long_rows() ? kept : x0_hat;
  const char* name = a.long_rows() ? "kept" : "x0_hat";
  check_target("x", x, a, seeds);
  if (target) {
    check_like(name, *target, x, sizes_of(x));
    check_target(name, *target, a, seeds);
    check_apart("x", x, name, *target);
  }
  run_reverse_step(a, seeds, x, name, target ? &*target : nullptr);
}

DIFFKERN_OP(reverse_step,
            "(Tensor x, Tensor? out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, float guidance, bool "
            "clip, bool learned_variance, Tensor[] history, bool return_x0, Tensor? address=None, Tensor? grad=None, "
            "Tensor? known=None, Tensor? mask=None) -> (Tensor, Tensor)")
DIFFKERN_OP(reverse_step_,
            "(Tensor(a!) x, Tensor? out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, float guidance, "
            "bool clip, bool learned_variance, Tensor[] history, Tensor(b!)? x0_hat, Tensor? address=None, Tensor? "
            "grad=None, Tensor? known=None, Tensor? mask=None, Tensor(c!)? kept=None) -> ()")

}  // namespace
}  // namespace diffkern
