// Whether what an op writes shares memory with what it reads.

#pragma once

#include <optional>

#include "checks.h"

namespace diffkern {

// The memory of a tensor's elements: within `bytes` of the beginning of each of `samples`, `step` bytes apart.
struct Reach {
  const char* begin;
  int64_t bytes, samples, step;

  explicit Reach(const Tensor& tensor)
      : begin(static_cast<const char*>(tensor.const_data_ptr())),
        samples(tensor.dim() > 0 ? tensor.size(0) : 1),
        step(tensor.dim() > 0 ? tensor.stride(0) * int64_t(tensor.element_size()) : 0) {
    int64_t last = 0;
    for (int64_t d = 1; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    bytes = (last + 1) * int64_t(tensor.element_size());
  }
  int64_t all() const { return (samples - 1) * step + bytes; }
};

// Compares the ranges of the samples if these are equally far apart in both, as in the halves of a tensor's channels, and
// else the ranges of the whole tensors: it may find an overlap where there is none, not the other way round.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const Reach x(a), y(b);
  const int64_t ahead = y.begin - x.begin;
  if (ahead >= x.all() || -ahead >= y.all()) return false;
  if (x.samples == 1 || y.samples == 1 || x.step != y.step) return true;
  const int64_t phase = (ahead % x.step + x.step) % x.step;
  return phase < x.bytes || x.step - phase < y.bytes;
}

// Whether each element of a lies where that of b does.
inline bool same_place(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return a.const_data_ptr() == b.const_data_ptr();
}

// Throws if `read` shares memory with the target that an op writes. `or_same`: for an op that reads an element before it
// writes there, and not again, the two may be the same element by element.
inline void check_apart(const char* target, const Tensor& written, const char* name, const Tensor& read,
                        bool or_same = false) {
  check(!overlap(written, read) || (or_same && same_place(written, read)), name, ": expected ",
        or_same ? text("the memory of ", target, " or other memory") : text("other memory than ", target, "'s"),
        ", got some of it");
}

inline void check_apart(const char* target, const Tensor& written, const char* name, const std::optional<Tensor>& read,
                        bool or_same = false) {
  if (read) check_apart(target, written, name, *read, or_same);
}

}  // namespace diffkern
