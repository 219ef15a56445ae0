// A program: what the CPU was told to do while this was being recorded, to be done again on the same memory.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <vector>

namespace diffkern {

struct Program {
  std::vector<std::function<void()>> launches;
  std::vector<torch::stable::Tensor> tensors;  // every one that a launch has a pointer into

  void run() const {
    for (const auto& launch : launches) launch();
  }
};

inline thread_local Program* recording = nullptr;

}  // namespace diffkern
