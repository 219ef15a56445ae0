// Runs of a sample as contiguous floats, whatever the tensor's dtype and strides: elementwise kernels know only these.
// float32 that is contiguous is used where it lies; anything else passes through a buffer that stays in the L1 cache.

#pragma once

#include "lanes/half.h"
#include "normals.h"
#include "view.h"

namespace diffkern {

struct Chunk {
  int64_t sample, first;  // the elements [first, first + count) of that sample
  int count;

  int padded() const { return (count + kNormals - 1) / kNormals * kNormals; }
};

DIFFKERN_FN Chunk chunk_of(int64_t item, int64_t elements) {
  int64_t per_sample = chunks(elements), first = item % per_sample * kChunk;
  int64_t count = elements - first;
  return {item / per_sample, first, int(count < kChunk ? count : kChunk)};
}

struct alignas(64) Buffer {
  float data[kChunk];
};

// Calls visit(position in the chunk, offset in memory, length, stride) for each run along the innermost dimension.
template <class Visit>
DIFFKERN_FN void for_each_run(const View& view, const Chunk& chunk, Visit visit) {
  int64_t index[kMaxDims], rest = chunk.first, offset = chunk.sample * view.batch_stride;
  for (int d = view.dims - 1; d >= 0; --d) {
    index[d] = rest % view.sizes[d];
    rest /= view.sizes[d];
    offset += index[d] * view.strides[d];
  }
  const int last = view.dims - 1;
  for (int position = 0; position < chunk.count;) {
    int64_t length = view.sizes[last] - index[last];
    if (length > chunk.count - position) length = chunk.count - position;
    visit(position, offset, int(length), view.strides[last]);
    position += int(length);
    index[last] += length;
    offset += length * view.strides[last];
    for (int d = last; d > 0 && index[d] == view.sizes[d]; --d) {  // carry
      offset += view.strides[d - 1] - index[d] * view.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

DIFFKERN_FN void fetch(const float* p, float* to) { *to = *p; }
DIFFKERN_FN void put(float* p, float value) { *p = value; }

// One element by the same conversion as a register of them.
template <class T>
DIFFKERN_FN void fetch(const T* p, float* to) {
  T lanes[kLanes] = {*p};
  *to = load(lanes)[0];
}
template <class T>
DIFFKERN_FN void put(T* p, float value) {
  T lanes[kLanes];
  store(lanes, broadcast(value));
  *p = lanes[0];
}

template <class T>
static void gather(const View& view, const Chunk& chunk, float* to) {
  for_each_run(view, chunk, [&](int position, int64_t offset, int length, int64_t stride) {
    const T* from = static_cast<const T*>(view.data) + offset;
    int i = 0;
    if (stride == 1)
      for (; i + kLanes <= length; i += kLanes) store(to + position + i, load(from + i));
    for (; i < length; ++i) fetch(from + i * stride, to + position + i);
  });
}

template <class T>
static void scatter(const View& view, const Chunk& chunk, const float* from) {
  for_each_run(view, chunk, [&](int position, int64_t offset, int length, int64_t stride) {
    T* to = static_cast<T*>(view.data) + offset;
    int i = 0;
    if (stride == 1)
      for (; i + kLanes <= length; i += kLanes) store(to + i, load(from + position + i));
    for (; i < length; ++i) put(to + i * stride, from[position + i]);
  });
}

DIFFKERN_FN bool in_place(const View& view, const Chunk& chunk) {
  return view.dtype == DType::f32 && view.contiguous() && chunk.count == chunk.padded();
}

DIFFKERN_FN float* address(const View& view, const Chunk& chunk) {
  return static_cast<float*>(view.data) + chunk.sample * view.batch_stride + chunk.first;
}

// The chunk's memory, if it lies together.
DIFFKERN_FN Wanted wanted(const View& view, const Chunk& chunk) {
  if (view.data == nullptr || !view.contiguous()) return {};
  const int size = view.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(view.data) + (chunk.sample * view.batch_stride + chunk.first) * size, size};
}

// The chunk's elements, then zeros up to a multiple of kNormals.
DIFFKERN_FN const float* staged(const View& view, const Chunk& chunk, Buffer& buffer) {
  if (in_place(view, chunk)) return address(view, chunk);
  for (int i = chunk.count; i < chunk.padded(); ++i) buffer.data[i] = 0;
  switch (view.dtype) {
    case DType::f32: gather<float>(view, chunk, buffer.data); break;
    case DType::bf16: gather<BFloat16>(view, chunk, buffer.data); break;
    case DType::f16: gather<Float16>(view, chunk, buffer.data); break;
  }
  return buffer.data;
}

// Returns memory to write the chunk's elements to; commit() then brings them to the tensor.
DIFFKERN_FN float* target(const View& view, const Chunk& chunk, Buffer& buffer) {
  return in_place(view, chunk) ? address(view, chunk) : buffer.data;
}

DIFFKERN_FN void commit(const View& view, const Chunk& chunk, const Buffer& buffer) {
  if (in_place(view, chunk)) return;
  switch (view.dtype) {
    case DType::f32: scatter<float>(view, chunk, buffer.data); break;
    case DType::bf16: scatter<BFloat16>(view, chunk, buffer.data); break;
    case DType::f16: scatter<Float16>(view, chunk, buffer.data); break;
  }
}

}  // namespace diffkern
