// The element types of tensors, without torch.

#pragma once

#include <cstdint>

namespace diffkern {

enum class DType : int32_t { f32, bf16, f16 };

}  // namespace diffkern
