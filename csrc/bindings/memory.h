// The memory of tensors, as kernels are given it: every pointer that they get comes from here.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "program.h"
#include "view.h"

#ifdef DIFFKERN_EMULATED_CUDA
extern "C" {
void* ptx_runtime_device();
void ptx_memory_add(void* device, uint64_t address, uint64_t bytes, const char* name, int written, int readonly);
void ptx_memory_remove(void* device, uint64_t address);
}
#endif

namespace diffkern {

#ifdef DIFFKERN_EMULATED_CUDA
// The interpreter faults an access that lies in no memory it was lent, a read of what nobody wrote, and a write to an
// input. A launch lends it that of its op's tensors, until the next one: so what it counted of them can be read.
class Lent {
 public:
  void make(const Tensor& tensor) { unwritten_.push_back(tensor); }
  void add(const Tensor& tensor, bool readonly) { asked_.emplace_back(tensor, readonly); }
  void open() {
    for (const Piece& piece : open_) ptx_memory_remove(ptx_runtime_device(), piece.begin);
    open_.clear();
    for (const auto& [tensor, readonly] : asked_) {
      int64_t elements = tensor.numel() > 0;
      for (int64_t d = 0; d < tensor.dim() && elements > 0; ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
      if (elements == 0) continue;
      const auto same = [data = tensor.data_ptr()](const Tensor& other) { return other.data_ptr() == data; };
      const uint64_t begin = reinterpret_cast<uint64_t>(tensor.data_ptr());
      join({begin, begin + elements * tensor.element_size(),
            std::none_of(unwritten_.begin(), unwritten_.end(), same), readonly});
    }
    for (const Piece& piece : open_)
      ptx_memory_add(ptx_runtime_device(), piece.begin, piece.end - piece.begin, "a tensor", piece.written,
                     piece.readonly);
    kept_ = std::move(asked_);
    asked_.clear();
    unwritten_.clear();
  }

 private:
  struct Piece {
    uint64_t begin, end;
    bool written, readonly;
  };

  // Tensors that share memory, as one does that lies in another's half, are lent as one piece.
  void join(Piece piece) {
    const auto apart = [&](const Piece& other) { return other.end <= piece.begin || piece.end <= other.begin; };
    const auto shared = std::stable_partition(open_.begin(), open_.end(), apart);
    for (auto other = shared; other != open_.end(); ++other)
      piece = {std::min(piece.begin, other->begin), std::max(piece.end, other->end), piece.written && other->written,
               piece.readonly && other->readonly};
    open_.erase(shared, open_.end());
    open_.push_back(piece);
  }

  std::vector<Tensor> unwritten_;
  std::vector<std::pair<Tensor, bool>> asked_, kept_;  // kept: no other tensor gets memory that is still lent
  std::vector<Piece> open_;
};
inline thread_local Lent lent;
inline uint64_t emulated_stream = 0;  // on which ops launch
#endif

// Throws unless the storage reaches as far as the tensor's elements do: one that was freed has no bytes left. An op that
// lets torch copy a tensor calls this first, since torch does not look.
inline void check_memory(const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0, first = 0, bytes = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    last += (sizes[d] - 1) * strides[d];
  }
  check(aoti_torch_get_storage_offset(tensor.get(), &first) == AOTI_TORCH_SUCCESS &&
            aoti_torch_get_storage_size(tensor.get(), &bytes) == AOTI_TORCH_SUCCESS,
        name, ": expected a tensor with a storage, got one without");
  const int64_t needed = (first + last + 1) * int64_t(tensor.element_size());
  check(bytes >= needed, name, ": expected a storage of at least ", needed, " bytes, got ", bytes);
}

template <class T>
T* memory(const char* name, const Tensor& tensor) {
  check_memory(name, tensor);
#ifdef DIFFKERN_EMULATED_CUDA
  lent.add(tensor, std::is_const_v<T>);
#endif
  if (recording) recording->tensors.push_back(tensor);
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// An index for each sample, or one for all.
struct Index {
  const int64_t* data;
  int64_t stride;
};

// Values must lie in [0, limit). Only the CPU's are looked at: a CUDA kernel writes NaN for those outside.
inline Index index_of(const char* name, const Tensor& tensor, int64_t samples, int64_t limit, const Tensor& like) {
  check_dtype(name, tensor, ScalarType::Long);
  check_device(name, tensor, like);
  const bool one = tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == 1);
  check(one || (tensor.dim() == 1 && tensor.size(0) == samples), name, ": expected shape () or (", samples,
        ",), got ", show(sizes_of(tensor)));
  const Index index{memory<const int64_t>(name, tensor), one ? 0 : tensor.stride(0)};
  if (!on_cuda(tensor))
    for (int64_t n = 0; n < (one ? int64_t(1) : samples); ++n) {
      const int64_t value = index.data[n * index.stride];
      check(value >= 0 && value < limit, name, ": expected values in [0, ", limit, "), got ", value);
    }
  return index;
}

// --- views ----------------------------------------------------------------------------------------------------------

inline DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::runtime_error(text(name, ": expected float32, bfloat16 or float16, got ", show(dtype)));
  }
}

// As if the tensor were expanded to these sizes: it has stride 0 along the dimensions in which its own size is 1.
inline View expanded_view_of(const char* name, const Tensor& tensor, const int64_t* sizes) {
  const auto stride_of = [&](int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  View view{memory<void>(name, tensor), dtype_of(name, tensor.scalar_type()), 0, stride_of(0), {}, {}};
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    const int64_t size = sizes[d], stride = stride_of(d);
    if (size == 1) continue;
    const int32_t last = view.dims - 1;
    if (view.dims > 0 && view.strides[last] == size * stride) {
      view.sizes[last] *= size;
      view.strides[last] = stride;
    } else {
      check(view.dims < kMaxDims, name, ": expected at most ", kMaxDims, " separate dimensions a sample, got more");
      view.sizes[view.dims] = size;
      view.strides[view.dims++] = stride;
    }
  }
  if (view.dims == 0) {  // one element a sample
    view.sizes[0] = view.strides[0] = 1;
    view.dims = 1;
  }
  return view;
}

inline View view_of(const char* name, const Tensor& tensor) {
  return expanded_view_of(name, tensor, tensor.sizes().data());
}

inline int64_t elements_of(const Tensor& tensor) {  // of one sample
  int64_t elements = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) elements *= tensor.size(d);
  return elements;
}

inline Tensor made(const Tensor& tensor) {
#ifdef DIFFKERN_EMULATED_CUDA
  lent.make(tensor);
#endif
  return tensor;
}

// In place of torch's error, which through the stable ABI names one of its functions and nothing else.
[[noreturn]] inline void throw_no_memory(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  throw std::runtime_error(text("memory: expected enough on ", show_device(like), " for a ", show(dtype),
                                " tensor of shape ", show(sizes), ", got less"));
}

inline Tensor empty_of(const Sizes& sizes, ScalarType dtype, const Tensor& like) try {
  return made(torch::stable::empty(sizes, dtype, std::nullopt, like.device()));
} catch (const std::runtime_error&) {
  throw_no_memory(sizes, dtype, like);
}

inline Tensor empty_as(const Tensor& like) try {
  return made(torch::stable::empty_like(like));
} catch (const std::runtime_error&) {
  throw_no_memory(sizes_of(like), like.scalar_type(), like);
}

inline Tensor absent(const Tensor& like) { return empty_of({0}, like.scalar_type(), like); }

}  // namespace diffkern
