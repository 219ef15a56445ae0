// The memory of tensors, as kernels are given it: every pointer that they get comes from here.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ops.h"
#include "checks.h"
#include "program.h"

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

template <class T>
T* memory(const Tensor& tensor) {
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
  const Index index{memory<const int64_t>(tensor), one ? 0 : tensor.stride(0)};
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

inline View view_of(const char* name, const Tensor& tensor) {
  View view{memory<void>(tensor), dtype_of(name, tensor.scalar_type()), 0, tensor.stride(0), {}, {}};
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
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

// Whether a view that is written shares memory with one that is read: told by the range of each sample, where both have
// theirs equally far apart (as the halves of a tensor's channels have), else by the range of all.
inline bool overlap(const View& written, const View& read, int64_t samples) {
  const int64_t size = written.dtype == DType::f32 ? 4 : 2;
  const auto bytes = [size](const View& view) {
    int64_t last = 0;
    for (int32_t d = 0; d < view.dims; ++d) last += (view.sizes[d] - 1) * view.strides[d];
    return (last + 1) * size;
  };
  const int64_t of_written = bytes(written), of_read = bytes(read), rest = (samples - 1) * size;
  const int64_t ahead = static_cast<const char*>(read.data) - static_cast<const char*>(written.data);
  if (ahead >= of_written + rest * written.batch_stride || -ahead >= of_read + rest * read.batch_stride) return false;
  if (samples == 1 || written.batch_stride != read.batch_stride) return true;
  const int64_t period = written.batch_stride * size, phase = (ahead % period + period) % period;
  return phase < of_written || period - phase < of_read;
}

inline bool same_place(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return a.const_data_ptr() == b.const_data_ptr();
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
