// One step of a sampler, functional and in place.

#include "bindings/op.h"
#include "row.h"

namespace diffkern {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What the two ops have in common.
struct Arguments {
  const Tensor& x;
  const OptionalTensor& out;
  const Tensor &table, &step, &seeds;
  const OptionalTensor& out_uncond;
  double guidance;
  bool clip, learned_variance;
  const std::vector<Tensor>& history;
  const OptionalTensor &address, &grad, &known, &mask;

  bool long_rows() const { return table.dim() == 2 && table.size(1) >= kLongColumns; }
};

void check_absent(const char* name, const OptionalTensor& tensor, const char* why) {
  check(!tensor, name, ": expected None ", why, ", got a tensor");
}

void check_operands(const Arguments& a) {
  if (a.long_rows()) {
    check(!a.clip, "clip: expected False with long rows, which have a limit, got True");
    check(a.guidance == 1, "guidance: expected 1 with long rows, which have w, got ", a.guidance);
    if (!a.out) {
      check_absent("out_uncond", a.out_uncond, "without out");
      check(!a.learned_variance, "learned_variance: expected False without out, got True");
    }
    check(!a.mask || a.known, "known: expected a tensor with mask, got None");
    check(!a.known || a.mask, "mask: expected a tensor with known, got None");
  } else {
    check(a.out.has_value(), "out: expected a tensor with short rows, got None");
    check_absent("address", a.address, "with short rows");
    check_absent("grad", a.grad, "with short rows");
    check_absent("known", a.known, "with short rows");
    check_absent("mask", a.mask, "with short rows");
  }
}

void check_table(const Arguments& a) {
  const int64_t slots = int64_t(a.history.size());
  const int64_t columns = a.long_rows() ? long_columns(slots) : kShortColumns + slots;
  const int64_t most = a.long_rows() ? long_columns(kMaxHistory) : columns;  // a slot may go without its tensor
  check(a.table.dim() == 2 && a.table.size(1) >= columns && a.table.size(1) <= most &&
            (a.table.size(1) - columns) % 4 == 0,
        "table: expected shape (steps, ", columns, "), got ", show(sizes_of(a.table)));
  check_dtype("table", a.table, ScalarType::Float);
  check_device("table", a.table, a.x);
  check_contiguous("table", a.table);
}

// In each dimension the size of x, or 1.
void check_mask(const Tensor& mask, const Tensor& x) {
  bool fits = mask.dim() == x.dim();
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = mask.size(d) == 1 || mask.size(d) == x.size(d);
  check(fits, "mask: expected shape ", show(sizes_of(x)), " or 1 in place of any size, got ", show(sizes_of(mask)));
  check_dtype("mask", mask, x.scalar_type());
  check_device("mask", mask, x);
}

// On the CPU, addresses are looked at: of the rows that are used and draw noise.
void check_addresses(const ReverseStepParams& p) {
  for (int64_t n = 0; n < (p.step_stride ? p.samples : 1); ++n) {
    const int64_t number = p.step[n * p.step_stride];
    const Row row = read_row(p, number);
    if ((row.sigma == 0 && row.b_z == 0) || has_address(row)) continue;
    if (p.columns < kLongColumns)
      check(false, "table: expected t in [0, 2^32), got ", row.k_j[-1], " in row ", number);
    check(p.address, "address: expected a tensor, for row ", number, " draws noise, got None");
    check(false, "address: expected 1 <= count <= address + 1 and address < 2^32, got count ", row.count,
          " and address ", row.address, " in row ", number);
  }
}

void run_reverse_step(const Arguments& a, const Tensor& x_next, const char* kept_name, const Tensor* kept) {
  const Tensor& x = a.x;
  check_samples("x", x, a.learned_variance);
  dtype_of("x", x.scalar_type());
  check_operands(a);
  const Sizes shape = sizes_of(x);
  Sizes out_shape = shape;
  if (a.learned_variance) out_shape[1] *= 2;
  if (a.out) check_like("out", *a.out, x, out_shape);
  if (a.out_uncond) check_like("out_uncond", *a.out_uncond, x, out_shape);
  if (a.grad) check_like("grad", *a.grad, x, shape);
  if (a.known) check_like("known", *a.known, x, shape);
  if (a.mask) check_mask(*a.mask, x);
  for (const Tensor& h : a.history) check_like("history", h, x, shape);
  check(a.history.size() <= size_t(kMaxHistory), "history: expected at most ", kMaxHistory, " tensors, got ",
        a.history.size());
  check_table(a);
  if (a.address) {
    check_shape("address", *a.address, {a.table.size(0), 2});
    check_dtype("address", *a.address, ScalarType::Long);
    check_device("address", *a.address, x);
    check_contiguous("address", *a.address);
  }
  check_vector("seeds", a.seeds, ScalarType::Long, x.size(0), x);
  const Index index = index_of("step", a.step, x.size(0), a.table.size(0), x);

  ReverseStepParams params{};
  params.x = view_of("x", x);
  params.x_next = view_of("x_next", x_next);
  if (a.out) params.out = view_of("out", *a.out);
  if (a.out_uncond) params.out_uncond = view_of("out_uncond", *a.out_uncond);
  if (kept) params.kept = view_of(kept_name, *kept);
  if (a.grad) params.grad = view_of("grad", *a.grad);
  if (a.known) params.known = view_of("known", *a.known);
  if (a.mask) params.mask = expanded_view_of("mask", *a.mask, shape.data());
  for (const Tensor& h : a.history) params.history[params.history_count++] = view_of("history", h);
  params.samples = x.size(0);
  params.elements = elements_of(x);
  params.seeds = memory<const int64_t>("seeds", a.seeds);
  params.table = memory<const float>("table", a.table);
  const auto beyond = reinterpret_cast<uintptr_t>(params.table) % alignof(Columns);
  check(beyond == 0 || !a.long_rows(), "table: expected memory at a multiple of ", alignof(Columns), " bytes, got ",
        beyond, " beyond one");
  params.rows = a.table.size(0);
  params.columns = a.table.size(1);
  if (a.address) params.address = memory<const int64_t>("address", *a.address);
  params.step = index.data;
  params.step_stride = index.stride;
  params.guidance = float(a.guidance);
  params.clip = a.clip;
  params.learned_variance = a.learned_variance;
  if (!on_cuda(x)) check_addresses(params);
  run_on_chunks(x, params, cpu::level().kernels.reverse_step, DIFFKERN_CUDA_LAUNCHER(reverse_step));
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
  run_reverse_step({x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, address, grad,
                    known, mask},
                   x_next, "kept", return_kept ? &kept : nullptr);
  return {x_next, kept};
}

// A target may lie where what is read element by element lies, or apart from it. The blend with what is known comes
// after the rest of a chunk is written.
void check_target(const char* target, const Tensor& written, const Arguments& a) {
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
  check_apart(target, written, "seeds", a.seeds);
}

void reverse_step_(const Tensor& x, const OptionalTensor& out, const Tensor& table, const Tensor& step,
                   const Tensor& seeds, const OptionalTensor& out_uncond, double guidance, bool clip,
                   bool learned_variance, const std::vector<Tensor>& history, const OptionalTensor& x0_hat,
                   const OptionalTensor& address, const OptionalTensor& grad, const OptionalTensor& known,
                   const OptionalTensor& mask, const OptionalTensor& kept) {
  const Arguments a{x,    out,     table,   step, seeds, out_uncond, guidance, clip, learned_variance,
                    history, address, grad, known, mask};
  if (a.long_rows())
    check_absent("x0_hat", x0_hat, "with long rows, which have kept");
  else
    check_absent("kept", kept, "with short rows, which have x0_hat");
  const OptionalTensor& target = a.long_rows() ? kept : x0_hat;
  const char* name = a.long_rows() ? "kept" : "x0_hat";
  check_target("x", x, a);
  if (target) {
    check_like(name, *target, x, sizes_of(x));
    check_target(name, *target, a);
    check_apart("x", x, name, *target);
  }
  run_reverse_step(a, x, name, target ? &*target : nullptr);
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
