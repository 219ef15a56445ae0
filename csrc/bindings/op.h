// The header that an op's bind.cpp includes, and the macros that make the op known to torch.
//
// An op reads: check, allocate, fill the params, run. It goes through the dispatcher by LibTorch's stable ABI, so that one
// build serves every later torch, and without a CUDA header, so that it builds and loads beside a CPU torch.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "checks.h"
#include "memory.h"
#include "negated.h"
#include "overlap.h"
#include "run.h"
#ifdef DIFFKERN_CUDA
#define DIFFKERN_CUDA_LAUNCHER(name) {#name, cuda::name}
#else
#define DIFFKERN_CUDA_LAUNCHER(name) {#name, nullptr}
#endif

#ifdef DIFFKERN_EMULATED_CUDA
#define DIFFKERN_LIBRARY diffkern_emulated
#else
#define DIFFKERN_LIBRARY diffkern
#endif

// The function `name` as an op of CPU tensors, or of these and CUDA's: it looks at their device itself. Tensors of other
// devices find no kernel and raise.
#define DIFFKERN_CPU_OP(name, schema) DIFFKERN_OP_OF(name, schema, false)
#define DIFFKERN_OP(name, schema)    \
  DIFFKERN_OP_OF(name, schema, true) \
  STABLE_TORCH_LIBRARY_IMPL(DIFFKERN_LIBRARY, CUDA, library) { library.impl(#name, TORCH_BOX(&name)); }

#define DIFFKERN_OP_OF(name, schema, may_be_cuda)                                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(DIFFKERN_LIBRARY, library) { library.def(#name schema); }             \
  STABLE_TORCH_LIBRARY_IMPL(DIFFKERN_LIBRARY, CPU, library) { library.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(DIFFKERN_LIBRARY, Negative, library) {                                    \
    resolve_negated<&name, may_be_cuda>(library, #name, schema);                                      \
  }
