// diffkern._C: what is no tensor op. The ops of the files beside this one register themselves when it is loaded.

#include "module.h"

#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../math/philox.h"
#include "checks.h"
#include "memory.h"
#include "program.h"

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

// The words of one counter, by the very function that the kernels instantiate.
std::array<uint32_t, 4> philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const auto words = philox(Words<uint64_t>{counter[0], counter[1], counter[2], counter[3]},
                            round_keys(uint64_t(key[1]) << 32 | key[0]));
  return {uint32_t(words.w0), uint32_t(words.w1), uint32_t(words.w2), uint32_t(words.w3)};
}

// The level in use, or why it cannot be the one that was asked for.
const char* cpu_level() {
  if (const char* error = cpu::level().error)
    throw std::invalid_argument(text("DIFFKERN_CPU_LEVEL: ", error, ", got '", std::getenv("DIFFKERN_CPU_LEVEL"), "'"));
  return cpu::level().name;
}

void add_program(pybind11::module_& module) {
  pybind11::class_<Program>(module, "Program", pybind11::module_local())
      .def(pybind11::init<>())
      .def("__enter__",
           [](Program& program) {
             check(!recording, "a program is being recorded already");
             recording = &program;
           })
      .def("__exit__", [](Program&, pybind11::args) { recording = nullptr; })
      .def("__len__", [](const Program& program) { return program.launches.size(); })
      .def("run", &Program::run, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace
}  // namespace diffkern

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace diffkern;
  using pybind11::arg;
  module.attr("COMPILED_CUDA_ARCHITECTURES") = DIFFKERN_CUDA_ARCHITECTURES;  // "sm_80;compute_80", or nothing
  module.attr("CUDA_LEFT_OUT") = DIFFKERN_CUDA_LEFT_OUT;                      // why there are none, or nothing
  module.attr("COMPILER") = __VERSION__;
  module.def("cpu_level", &cpu_level);
  module.def("cpu_levels", &cpu::supported_levels);
  module.def("philox", &philox_words, arg("counter"), arg("key"));
  module.def("word_hash", &word_hash, arg("function"), arg("first_run") = 0,
             arg("last_run") = (int64_t(1) << 32) / kCodesPerHash,
             pybind11::call_guard<pybind11::gil_scoped_release>());
  add_program(module);
  add_plans(module);
}
