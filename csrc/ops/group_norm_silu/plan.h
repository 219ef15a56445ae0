// How group_norm_silu is laid over blocks and shared memory: a pure function of the sizes.

#pragma once

#include <cstdint>

#include "params.h"

namespace diffkern::cuda {

// How group_norm_silu is laid over blocks: a block has a chunk of the pixels of a set of whole groups of a sample,
// small enough for shared memory. One chunk: one launch. More: a launch that sums each, and a launch that joins the sums.
struct GroupNormPlan {
  static constexpr int kThreads = 256, kMaxGroups = 16, kMaxWidth = 512;  // of a set, of a group
  static constexpr int kSlabBytes = 32768, kStagingFloats = 2 * 8 * kThreads;
  static constexpr int kMaxChannels = 768;  // of a set: what the smallest card, of sm_75, has room for beside the slab

  int32_t vector;                    // elements of an access: 16 bytes of them, or 1
  int32_t set_groups, set_channels;  // of a set
  int32_t sets;                      // of a sample
  int32_t chunk_pixels, chunks;      // of a set
  int32_t slab_bytes, shared_bytes;
  double per_pixel, per_element;  // 1 / the pixels of an image, and of all channels of a group

  uint32_t grid_x() const { return uint32_t(sets) * uint32_t(chunks); }
  static uint32_t grid_y(int64_t samples) { return uint32_t(samples < 65535 ? samples : 65535); }
  int launches() const { return chunks == 1 ? 1 : 2; }
};

inline GroupNormPlan plan_group_norm(const GroupNormSiluParams& p) {
  const int64_t size = p.dtype == DType::f32 ? 4 : 2, vector = 16 / size, width = p.channels / p.groups;
  int64_t set = 1;  // channels_last: whole sectors of 32 bytes and accesses of 16; else a channel for each of 8 warps
  auto wide_enough = [&] {
    const int64_t bytes = set * width * size;
    return p.channels_last ? bytes >= 32 && bytes % 16 == 0 : set * width >= 8;
  };
  while (set < p.groups && !wide_enough()) ++set;
  if (set * width > GroupNormPlan::kMaxChannels) set = 1;  // odd widths: an element at a time
  const int64_t channels = set * width, capacity = GroupNormPlan::kSlabBytes / (channels * size) / 8 * 8;
  const int64_t fewest = (p.pixels + capacity - 1) / capacity;
  const int64_t chunk = ((p.pixels + fewest - 1) / fewest + 7) / 8 * 8, slab = chunk * channels * size;
  bool vectors = p.channels_last ? p.channels % vector == 0 && channels % vector == 0 : p.pixels % vector == 0;
  const void* const tensors[] = {p.x, p.residual, p.y, p.grad_y, p.grad_x};
  for (const void* tensor : tensors)
    vectors = vectors && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return {int32_t(vectors ? vector : 1),
          int32_t(set),
          int32_t(channels),
          int32_t((p.groups + set - 1) / set),
          int32_t(chunk),
          int32_t((p.pixels + chunk - 1) / chunk),
          int32_t(slab),
          int32_t(4 * (GroupNormPlan::kStagingFloats + 5 * channels) + slab),
          1.0 / double(p.pixels),
          1.0 / double(p.pixels * width)};
}

}  // namespace diffkern::cuda
