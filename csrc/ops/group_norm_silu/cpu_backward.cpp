// The gradient of group_norm_silu: the sums of each channel, and then grad_x (cpu_tiles.h).

#include "cpu_tiles.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

// The beginning of both passes: (x - center) and grad_z of one register.
struct Gradient {
  f32v distance, grad_z;
};

DIFFKERN_FN Gradient gradient_of(f32v x, f32v grad_y, f32v center, f32v slope, f32v offset, bool activate) {
  const f32v distance = x - center;
  if (!activate) return {distance, grad_y};
  return {distance, grad_y * silu_slope(normalised(distance, slope, offset))};
}

template <int n>
DIFFKERN_FN void add_lanes(const f32v (&a)[n], double (&to)[n * kLanes]) {
  float lanes[n * kLanes];
  for (int v = 0; v < n; ++v) store(lanes + v * kLanes, a[v]);
  for (int l = 0; l < n * kLanes; ++l) to[l] += lanes[l];
}

// Adds up grad_z and grad_z (x - center) of each of the tile's channels.
template <class T, class Row, int n = Row::registers>
void add_gradients(const GroupNormSiluParams& p, const Tile& tile, const Row& row, int64_t sample,
                   const Spread<3, n>& coefficients) {
  const auto [center, slope, offset] = coefficients.of;
  const T* x = tile.template x<T>();
  const T* grad_y = static_cast<const T*>(p.grad_y) + tile.offset;
  const bool activate = p.silu;
  double first_total[n * kLanes] = {}, second_total[n * kLanes] = {};
  for (int64_t first = 0; first < tile.rows; first += kRun) {
    Sums<n> sums{};
    for (int64_t r = first; r < tile.rows && r < first + kRun; ++r)
      for (int v = 0; v < n; ++v) {
        const int64_t i = r * tile.stride + v * kLanes;
        const auto [distance, grad_z] =
            gradient_of(row.get(x + i), row.get(grad_y + i), center[v], slope[v], offset[v], activate);
        sums.first[v] = sums.first[v] + grad_z;
        sums.second[v] = multiply_add(grad_z, distance, sums.second[v]);
      }
    if (p.channels_last) {
      add_lanes(sums.first, first_total);
      add_lanes(sums.second, second_total);
    } else {
      first_total[0] += total(sums.first);
      second_total[0] += total(sums.second);
    }
  }
  const int channels = p.channels_last ? row.lanes : 1;
  for (int l = 0; l < channels; ++l) {
    p.grad_offset[sample * p.channels + tile.channel + l] += float(first_total[l]);
    p.grad_slope[sample * p.channels + tile.channel + l] += float(second_total[l]);
  }
}

// grad_x = slope grad_z + by_distance (x - center) + constant
template <class T, class Row, int n = Row::registers>
void write_gradient(const GroupNormSiluParams& p, const Tile& tile, const Row& row,
                    const Spread<5, n>& coefficients) {
  const auto [center, slope, offset, by_distance, constant] = coefficients.of;
  const T* x = tile.template x<T>();
  const T* grad_y = static_cast<const T*>(p.grad_y) + tile.offset;
  T* grad_x = static_cast<T*>(p.grad_x) + tile.offset;
  const bool activate = p.silu;
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int v = 0; v < n; ++v) {
      const int64_t i = r * tile.stride + v * kLanes;
      const auto [distance, grad_z] =
          gradient_of(row.get(x + i), row.get(grad_y + i), center[v], slope[v], offset[v], activate);
      row.put(grad_x + i, input_gradient(grad_z, distance, slope[v], by_distance[v], constant[v]));
    }
}

// The coefficients of write_gradient. `of_one`, `of_xhat`: for each group, rstd m(w grad_z) and rstd m(w grad_z xhat).
struct GradientOf {
  const AffineOf& affine_of;
  const double *of_one, *of_xhat;

  Coefficients<5> operator()(int64_t channel, int64_t group) const {
    const auto [center, slope, offset] = affine_of(channel, group).of;
    return {{center, slope, offset, float(-of_xhat[group] * affine_of.statistics.rstd[group]), float(-of_one[group])}};
  }
};

template <class T>
void backward(const GroupNormSiluParams& p, const Block& block) {
  const int64_t first_channel = block.first_group * block.width, channels = block.groups * block.width;
  float* grad_offset = p.grad_offset + block.sample * p.channels;
  float* grad_slope = p.grad_slope + block.sample * p.channels;
  Statistics statistics;
  for (int64_t g = 0, first = block.sample * p.groups + block.first_group; g < block.groups; ++g) {
    statistics.mean[g] = p.mean[first + g];
    statistics.rstd[g] = p.rstd[first + g];
  }
  const AffineOf affine_of{p, block.sample, statistics};

  for (int64_t c = first_channel; c < first_channel + channels; ++c) grad_offset[c] = grad_slope[c] = 0;
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    add_gradients<T>(p, tile, row, block.sample, spread<3>(p, block, tile, row, affine_of));
  });

  double of_one[kMaxGroupsPerBlock] = {}, of_xhat[kMaxGroupsPerBlock] = {};
  const double share = 1.0 / double(block.width * p.pixels);
  for (int64_t c = first_channel; c < first_channel + channels; ++c) {
    const int64_t g = block.group_of(c);
    grad_slope[c] = float(grad_slope[c] * statistics.rstd[g]);
    const double weight = affine_of(c, g).of[1] * share;
    of_one[g] += weight * grad_offset[c];
    of_xhat[g] += weight * grad_slope[c];
  }

  const GradientOf gradient{affine_of, of_one, of_xhat};
  for_each_tile(p, block, [&](const Tile& tile, const auto& row) DIFFKERN_ONCE {
    write_gradient<T>(p, tile, row, spread<5>(p, block, tile, row, gradient));
  });
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) switch (p.dtype) {
      case DType::f32: backward<float>(p, block_of(p, item)); break;
      case DType::bf16: backward<BFloat16>(p, block_of(p, item)); break;
      case DType::f16: backward<Float16>(p, block_of(p, item)); break;
    }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
