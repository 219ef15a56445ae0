// Running a kernel: on torch's threads, or on its current CUDA stream.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <dlfcn.h>

#include "cpu/kernels.h"
#include "checks.h"
#include "memory.h"
#include "program.h"
#include "view.h"

namespace diffkern {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// torch's current stream, from the CUDA half of torch if the process has loaded it.
inline void* current_stream(int32_t device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(get != nullptr, "a CUDA tensor came, but this torch has no libtorch_cuda.so");
  void* stream = nullptr;
  check(get(device, &stream) == AOTI_TORCH_SUCCESS, "torch gave no current CUDA stream");
  return stream;
}

template <class Params>
using CpuKernel = std::type_identity_t<void (*)(const Params&, int64_t begin, int64_t end)>;
template <class Params>
struct OpLauncher {
  const char* op = nullptr;
  const char* (*launch)(const Params&, void* stream) = nullptr;
};
template <class Params>
using CudaLauncher = std::type_identity_t<OpLauncher<Params>>;

template <class Params>
void run_cpu(const Params& params, CpuKernel<Params> kernel, int64_t items, int64_t grain) {
  const auto launch = [=] {
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  };
  if (recording) recording->launches.push_back(launch);
  launch();
}

template <class Params>
void run_cuda(const Tensor& where, const Params& params, CudaLauncher<Params> cuda) {
  check(!recording, "a CUDA tensor came while a program of CPU kernels was being recorded");
  check(cuda.launch != nullptr, "a CUDA tensor came, but diffkern was built without CUDA kernels: diffkern doctor says why");
  const char* error;
#ifdef DIFFKERN_EMULATED_CUDA
  lent.open();
  error = cuda.launch(params, reinterpret_cast<void*>(emulated_stream));
#else
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  error = cuda.launch(params, current_stream(where.get_device_index()));
#endif
  check(error == nullptr, cuda.op, ": expected its CUDA kernels to launch, got: ", error ? error : "");
}

constexpr int64_t kChunkGrain = 16;  // chunks a thread must have to be worth waking: about 10 us

// Runs an op whose CPU work items are the chunks of its samples.
template <class Params>
void run_on_chunks(const Tensor& where, const Params& params, CpuKernel<Params> cpu, CudaLauncher<Params> cuda) {
  if (params.samples * params.elements == 0) return;
  if (on_cuda(where)) return run_cuda(where, params, cuda);
  run_cpu(params, cpu, params.samples * chunks(params.elements), kChunkGrain);
}

// Work items a thread must have to be worth waking, of so many products each: about 10 us.
inline int64_t grain(int64_t products) { return std::max(int64_t(1), 500'000 / std::max(int64_t(1), products)); }

}  // namespace diffkern
