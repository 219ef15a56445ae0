// Checks the operands of an op that reads a row of the table, and makes them its parameters.

#pragma once

#include "bindings/op.h"
#include "row.h"

namespace diffkern {

using OptionalTensor = std::optional<Tensor>;

// The operands that a step reads, except for the noise's seeds. All of them outlive the op.
struct StepOperands {
  const Tensor& x;
  const OptionalTensor& out;
  const Tensor &table, &step;
  const OptionalTensor& out_uncond;
  double guidance;
  bool clip, learned_variance;
  const std::vector<Tensor>& history;
  const OptionalTensor &address, &grad, &known, &mask;
  bool reads_history = true;  // or the rows may have any slots

  bool long_rows() const { return table.dim() == 2 && table.size(1) >= kLongColumns; }
};

inline void check_absent(const char* name, const OptionalTensor& tensor, const char* why) {
  check(!tensor, name, ": expected None ", why, ", got a tensor");
}

inline void check_which(const StepOperands& a) {
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

inline void check_table(const StepOperands& a) {
  const int64_t slots = int64_t(a.history.size());
  const int64_t columns = a.long_rows() ? long_columns(slots) : kShortColumns + slots, pad = a.long_rows() ? 4 : 1;
  int64_t most = columns;
  if (a.long_rows()) most = long_columns(kMaxHistory);  // a slot may go without its tensor
  if (!a.long_rows() && !a.reads_history) most = kShortColumns + kMaxHistory;
  check(a.table.dim() == 2 && a.table.size(1) >= columns && a.table.size(1) <= most &&
            (a.table.size(1) - columns) % pad == 0,
        "table: expected shape (steps, ", columns, "), got ", show(sizes_of(a.table)));
  check_dtype("table", a.table, ScalarType::Float);
  check_device("table", a.table, a.x);
  check_contiguous("table", a.table);
}

// In each dimension the size of x, or 1.
inline void check_mask(const Tensor& mask, const Tensor& x) {
  bool fits = mask.dim() == x.dim();
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = mask.size(d) == 1 || mask.size(d) == x.size(d);
  check(fits, "mask: expected shape ", show(sizes_of(x)), " or 1 in place of any size, got ", show(sizes_of(mask)));
  check_dtype("mask", mask, x.scalar_type());
  check_device("mask", mask, x);
}

// Without x_next, kept and seeds.
inline ReverseStepParams params_of(const StepOperands& a) {
  const Tensor& x = a.x;
  check_samples("x", x, a.learned_variance);
  dtype_of("x", x.scalar_type());
  check_which(a);
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
  const Index index = index_of("step", a.step, x.size(0), a.table.size(0), x);

  ReverseStepParams params{};
  params.x = view_of("x", x);
  if (a.out) params.out = view_of("out", *a.out);
  if (a.out_uncond) params.out_uncond = view_of("out_uncond", *a.out_uncond);
  if (a.grad) params.grad = view_of("grad", *a.grad);
  if (a.known) params.known = view_of("known", *a.known);
  if (a.mask) params.mask = expanded_view_of("mask", *a.mask, shape.data());
  for (const Tensor& h : a.history) params.history[params.history_count++] = view_of("history", h);
  params.samples = x.size(0);
  params.elements = elements_of(x);
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
  return params;
}

}  // namespace diffkern
