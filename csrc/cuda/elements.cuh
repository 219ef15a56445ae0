// Shared by the elementwise CUDA kernels: 16 bytes of a sample at a time as floats, and the normals that belong to them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "math/normal.h"
#include "math/philox.h"
#include "plan.h"
#include "stream.h"
#include "view.h"

namespace diffkern::cuda {

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements a thread does at a time: one Philox block of float32, two of 16 bits

DIFFKERN_FN float to_f32(float a) { return a; }
DIFFKERN_FN float to_f32(__nv_bfloat16 a) { return __bfloat162float(a); }
DIFFKERN_FN float to_f32(__half a) { return __half2float(a); }

template <class T>
DIFFKERN_FN T from_f32(float a);
template <>
__device__ __forceinline__ float from_f32<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ __forceinline__ __half from_f32<__half>(float a) {
  return __float2half_rn(a);
}

// A view, and whether every vector of it is 16 aligned bytes: `vectors` where a sample lies together, `runs` where the
// vectors of its innermost dimension do, as in a mask that all channels share.
template <class T>
struct Access {
  View view;
  bool vectors, runs;

  Access() = default;
  Access(const View& v, int64_t elements) : view(v), vectors(false), runs(false) {
    if (v.data == nullptr || reinterpret_cast<uintptr_t>(v.data) % 16 != 0) return;
    const int last = v.dims - 1;
    runs = elements % kVector<T> == 0 && v.batch_stride % kVector<T> == 0 && v.strides[last] == 1 &&
           v.sizes[last] % kVector<T> == 0;
    for (int d = 0; d < last; ++d) runs = runs && v.strides[d] % kVector<T> == 0;
    vectors = runs && v.contiguous();
  }
};

template <class T>
struct alignas(16) Packed {
  T value[kVector<T>];
};

// The address of one element, by dividing its index over the dimensions.
template <class T>
DIFFKERN_FN T* address(const View& view, int64_t sample, int64_t element) {
  int64_t offset = sample * view.batch_stride;
#pragma unroll 1
  for (int d = view.dims - 1; d > 0; --d) {
    offset += element % view.sizes[d] * view.strides[d];
    element /= view.sizes[d];
  }
  return static_cast<T*>(view.data) + offset + element * view.strides[0];
}

// The slow path, for anything but an aligned vector within one sample. It is not inlined, to keep kernels small.
template <class T>
__device__ __noinline__ Packed<T> gather(const Access<T>& access, int64_t sample, int64_t first, int64_t end) {
  if (access.runs) return *reinterpret_cast<const Packed<T>*>(address<T>(access.view, sample, first));
  Packed<T> packed{};
  if (access.view.data == nullptr) return packed;
#pragma unroll 1
  for (int i = 0; i < kVector<T> && first + i < end; ++i) packed.value[i] = *address<T>(access.view, sample, first + i);
  return packed;
}

template <class T>
__device__ __noinline__ void scatter(const View& view, int64_t sample, int64_t first, int64_t end, Packed<T> packed) {
#pragma unroll 1
  for (int i = 0; i < kVector<T> && first + i < end; ++i) *address<T>(view, sample, first + i) = packed.value[i];
}

template <class T>
DIFFKERN_FN Packed<T>* vector_address(const View& view, int64_t sample, int64_t first) {
  return reinterpret_cast<Packed<T>*>(static_cast<T*>(view.data) + sample * view.batch_stride + first);
}

// Elements [first, first + kVector) of a sample, those before `end`; 0 for the rest, and for a tensor that is not there.
template <class T>
DIFFKERN_FN void load(const Access<T>& access, int64_t sample, int64_t first, int64_t end, float (&to)[kVector<T>]) {
  const Packed<T> packed =
      access.vectors ? *vector_address<T>(access.view, sample, first) : gather<T>(access, sample, first, end);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) to[i] = to_f32(packed.value[i]);
}

template <class T>
DIFFKERN_FN void store(const Access<T>& access, int64_t sample, int64_t first, int64_t end,
                       const float (&from)[kVector<T>]) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) packed.value[i] = from_f32<T>(from[i]);
  if (access.vectors)  // by __stwb: of an assignment nvcc here makes a store an element
    __stwb(reinterpret_cast<uint4*>(vector_address<T>(access.view, sample, first)),
           reinterpret_cast<const uint4&>(packed));
  else
    scatter<T>(access.view, sample, first, end, packed);
}

DIFFKERN_FN float nan() { return __int_as_float(0x7FFFFFFF); }

// The normals of elements [first, first + n), n a multiple of 4, of a sample; NaN if the step is no word.
template <int n>
DIFFKERN_FN void normals(uint64_t seed, int64_t step, uint32_t stream, int64_t first, float (&z)[n]) {
  if (uint64_t(step) >> 32 != 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) z[i] = nan();
    return;
  }
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    const uint64_t block = uint64_t(first + i) / 4;
    const Words<uint64_t> counter{uint32_t(block), block >> 32, uint32_t(step), stream};
    const Words<uint64_t> w = philox(counter, round_keys(seed));
    const Rounded r0 = radius<Rounded>(uint32_t(w.w0)), r2 = radius<Rounded>(uint32_t(w.w2));
    const CosSin<Rounded> p1 = cos_sin<Rounded>(uint32_t(w.w1)), p3 = cos_sin<Rounded>(uint32_t(w.w3));
    z[i] = (r0 * p1.cos).value;
    z[i + 1] = (r0 * p1.sin).value;
    z[i + 2] = (r2 * p3.cos).value;
    z[i + 3] = (r2 * p3.sin).value;
  }
}

// Calls visit(sample, first element) for every vector of every sample.
template <int vector, class Visit>
DIFFKERN_FN void for_each_vector(int64_t samples, int64_t elements, Visit visit) {
  const int64_t start = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * vector;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * vector;
  for (int64_t sample = blockIdx.y; sample < samples; sample += gridDim.y)
    for (int64_t first = start; first < elements; first += stride) visit(sample, first);
}

template <class T>
struct Type {
  using type = T;
};

// Null, or the text of a failed call of the runtime, which would keep that error for the next one who asks for its last.
inline const char* report(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Enqueues a kernel, for whose blocks as much shared memory is allowed as they want. The error that it returns is this
// launch's own.
template <class... Params>
const char* launch_kernel(void (*kernel)(Params...), dim3 grid, unsigned threads, int shared_bytes, Stream stream,
                          const typename Type<Params>::type&... params) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 0) {
    constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const char* error = report(cudaFuncSetAttribute(function, kAttribute, shared_bytes))) return error;
  }
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return report(
      cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, static_cast<cudaStream_t>(stream)));
}

// One that wants no shared memory beside what it declares, on an elementwise plan.
template <class... Params>
const char* launch_kernel(void (*kernel)(Params...), const Plan& plan, Stream stream,
                          const typename Type<Params>::type&... params) {
  return launch_kernel(kernel, dim3(plan.grid_x, plan.grid_y), plan.threads, 0, stream, params...);
}

// Calls run(Type<T>) for the element type of that dtype.
template <class Run>
const char* with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(Type<float>{});
    case DType::bf16: return run(Type<__nv_bfloat16>{});
    case DType::f16: return run(Type<__half>{});
  }
  return "unknown dtype";
}

template <class T>
Plan plan_vectors(int64_t samples, int64_t elements) {
  return plan_elementwise(samples, (elements + kVector<T> - 1) / kVector<T>);
}

}  // namespace diffkern::cuda
