// Definitions that the interpreted ops need besides their own code.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "bindings/memory.h"
#include "cpu/kernels.h"

namespace diffkern::cpu {

const Level& level() {  // of kernels that none of these ops runs
  static const Level none{"none", nullptr, {}};
  return none;
}

}  // namespace diffkern::cpu

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED int diffkern_ptx = DIFFKERN_PTX;  // the architecture that the kernels were compiled for

EXPORTED void diffkern_set_stream(uint64_t stream) { diffkern::emulated_stream = stream; }

// The interpreter's, which tells the architecture of the card in place of that of the kernels.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  static const auto get =
      reinterpret_cast<decltype(&cudaFuncGetAttributes)>(dlsym(RTLD_DEFAULT, "cudaFuncGetAttributes"));
  const cudaError_t error = get(attributes, kernel);
  attributes->ptxVersion = diffkern_ptx;
  return error;
}

}
