// Python's word_hash, which is no tensor op.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/module.h"
#include "cpu/kernels.h"

namespace diffkern {
namespace {

uint64_t word_hash(const std::string& function, int64_t first_run, int64_t last_run) {
  check(function == "radius" || function == "angle", "function: expected 'radius' or 'angle', got '", function, "'");
  check(0 <= first_run && first_run <= last_run && last_run <= (int64_t(1) << 32) / kCodesPerHash,
        "runs: expected 0 <= first <= last <= 4096, got ", first_run, " and ", last_run);
  std::vector<uint64_t> hash(last_run);
  const WordHashParams params{function == "angle", hash.data()};
  torch::stable::parallel_for(first_run, last_run, 1, [&](int64_t begin, int64_t end) {
    cpu::level().kernels.word_hash(params, begin, end);
  });
  uint64_t sum = 0;
  for (int64_t run = first_run; run < last_run; ++run) sum += hash[run];
  return sum;
}

}  // namespace

void add_word_hash(pybind11::module_& module) {
  using pybind11::arg;
  module.def("word_hash", &word_hash, arg("function"), arg("first_run") = 0,
             arg("last_run") = (int64_t(1) << 32) / kCodesPerHash,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace diffkern
