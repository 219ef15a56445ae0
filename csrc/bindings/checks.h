// The checks of an op's arguments. Every message reads `argument: expected this, got that`.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/layout_bf16.h"

namespace diffkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// For tests, the binding is built once more over a runtime that interprets CUDA kernels on the CPU: its ops have a
// library of their own and give CPU tensors to the CUDA launchers.
#ifdef DIFFKERN_EMULATED_CUDA
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// A macro, so that the message's parts are made only where it is needed: else they would be most of a small call's time.
#define check(holds, ...)                                          \
  do {                                                             \
    if (!(holds)) throw std::runtime_error(text(__VA_ARGS__));     \
  } while (false)

inline std::string show(const Sizes& sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + (sizes.size() == 1 ? ",)" : ")");
}

inline const char* show(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another dtype";
  }
}

inline bool on_cuda(const Tensor& tensor) { return kEmulated || tensor.is_cuda(); }

inline std::string show_device(const Tensor& tensor) {
  return tensor.is_cuda() ? text("cuda:", tensor.get_device_index()) : "cpu";
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected ", show(expected), ", got ", show(tensor.scalar_type()));
}

inline void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  const auto sizes = tensor.sizes();
  check(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": expected shape ",
        show(expected), ", got ", show(sizes_of(tensor)));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        ": expected device ", show_device(like), ", got ", show_device(tensor));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
        show({tensor.strides().begin(), tensor.strides().end()}));
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& like, const Sizes& shape) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, like.scalar_type());
  check_device(name, tensor, like);
}

inline void check_vector(const char* name, const Tensor& tensor, ScalarType dtype, int64_t length, const Tensor& like) {
  check_shape(name, tensor, {length});
  check_dtype(name, tensor, dtype);
  check_device(name, tensor, like);
  check_contiguous(name, tensor);
}

inline void check_samples(const char* name, const Tensor& tensor, bool with_channels = false) {
  check(tensor.dim() > with_channels, name, ": expected ", with_channels ? "[N, C, ...]" : "[N, ...]", ", got shape ",
        show(sizes_of(tensor)));
}

// Dense in memory as [N, H, W, C].
inline void check_channels_last(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 4, name, ": expected [N, C, H, W], got shape ", show(sizes_of(tensor)));
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    check(tensor.size(d) == 1 || tensor.stride(d) == stride || tensor.numel() == 0, name,
          ": expected channels_last memory, got strides ", show({tensor.strides().begin(), tensor.strides().end()}));
    stride *= tensor.size(d);
  }
}

inline void check_image(const char* name, const Tensor& image, const Tensor& like, const Sizes& shape) {
  check_like(name, image, like, shape);
  check_channels_last(name, image);
}

// [N, C / 32, H + 2, W + 2, 32]
inline void check_blocked(const char* name, const Tensor& image, int terms) {
  check(image.dim() == 6 && image.size(2) == terms && image.size(3) > 2 && image.size(4) > 2 &&
            image.size(5) == kDepthBlock,
        name, ": expected [N, C / 32, ", terms, ", H + 2, W + 2, 32], got shape ", show(sizes_of(image)));
  check_dtype(name, image, ScalarType::BFloat16);
  check_contiguous(name, image);
}

inline void check_writable(const char* name, const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    check(tensor.size(d) < 2 || tensor.stride(d) != 0, name, ": expected a tensor to write to, got an expanded one");
}

}  // namespace diffkern
