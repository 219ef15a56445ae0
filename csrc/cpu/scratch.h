// Scratch of the kernels. A kernel keeps its large arrays here: torch's threads may have stacks of 256 KB.

#pragma once

#include <type_traits>

#include "lanes/lanes.h"

namespace diffkern::cpu {

// At least so many bytes, aligned to a cache line, with any contents. A thread owns one such buffer, which grows to the
// largest request, stays where it is between two growths, and is freed when the thread ends. Throws std::bad_alloc.
void* scratch(int64_t bytes);

DIFFKERN_FN float* scratch_floats(int64_t count) { return static_cast<float*>(scratch(count * sizeof(float))); }

// The same, as the arrays that a struct names.
template <class Arrays>
DIFFKERN_FN Arrays& scratch() {
  static_assert(std::is_trivially_default_constructible_v<Arrays> && std::is_trivially_destructible_v<Arrays>);
  static_assert(alignof(Arrays) <= 64);
  return *static_cast<Arrays*>(scratch(sizeof(Arrays)));
}

}  // namespace diffkern::cpu
