// diffkern._C: what is no tensor op. The ops register themselves when it is loaded (ops/*/bind.cpp).

#include "module.h"

#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "math/philox.h"
#include "program.h"

namespace diffkern {
namespace {

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
  add_program(module);
  add_plans(module);
  add_word_hash(module);
}
