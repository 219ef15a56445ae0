// Training losses with eps made again instead of stored (math/loss.h). Forward: sums over each chunk, then over those of
// each sample, in a fixed order, so that no split changes the bits. Backward: each element by itself.

#include "math/loss.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

namespace {

struct Buffers {
  Buffer out, second_half, x_0, eps, grad_out, grad_second_half;
};

DIFFKERN_FN LossRow row_of(const DiffusionLossParams& p, int64_t n) {
  LossRow row = kNoiseRow;
  if (p.table) std::memcpy(&row, p.table + p.step[n * p.step_stride] * kLossColumns, sizeof row);
  return row;
}

// A chunk of each operand, as contiguous floats.
struct Operands {
  Chunk chunk;
  const float *out, *eps;
  const float *second_half, *x_0;  // null where there are none
};

DIFFKERN_FN Chunk second_half_of(const DiffusionLossParams& p, Chunk chunk) {
  chunk.first += p.elements;
  return chunk;
}

DIFFKERN_FN Operands operands_of(const DiffusionLossParams& p, const Chunk& chunk, Buffers& buffers) {
  const int64_t n = chunk.sample;
  const int64_t address = p.address ? p.address[n * p.address_stride] : p.step[n * p.step_stride];
  normals(NoiseAddress(uint64_t(p.seeds[n]), uint32_t(address), kForwardNoising), chunk.first, chunk.padded(),
          buffers.eps.data, wanted(p.out, chunk), wanted(p.x_0, chunk), wanted(p.grad_out, chunk));
  return {chunk, staged(p.out, chunk, buffers.out), buffers.eps.data,
          p.learned_variance ? staged(p.out, second_half_of(p, chunk), buffers.second_half) : nullptr,
          p.x_0.data ? staged(p.x_0, chunk, buffers.x_0) : nullptr};
}

// 0 beyond the chunk's last element.
DIFFKERN_FN f32v inside(const Chunk& chunk, int at, f32v value) {
  i32v lane{};
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  return lane + at < chunk.count ? value : f32v{};
}

// Calls visit(position, o - its target) for each register.
template <class Visit>
DIFFKERN_FN void for_each_error(const LossRow& row, const Operands& of, Visit visit) {
  for (int i = 0; i < of.chunk.padded(); i += kLanes) {
    f32v target = row.y_e * load(of.eps + i);
    if (of.x_0) target = row.y_x * load(of.x_0 + i) + target;
    visit(i, inside(of.chunk, i, load(of.out + i) - target));
  }
}

// Calls visit(position, the bound's term) for each register; anything beyond the chunk's last element.
template <class Visit>
DIFFKERN_FN void for_each_term(const LossRow& row, bool clip, const Operands& of, Visit visit) {
  const float base = of.second_half ? row.log_var_min : row.log_var_max;
  for (int i = 0; i < of.chunk.padded(); i += kLanes) {
    const f32v above = of.second_half ? learned_log_var(row, load(of.second_half + i)) : f32v{};
    visit(i, bound_term(row, clip, load(of.x_0 + i), load(of.eps + i), load(of.out + i), base, above));
  }
}

}  // namespace

void diffusion_loss_partial(const DiffusionLossParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements);
    const LossRow row = row_of(p, chunk.sample);
    const Operands of = operands_of(p, chunk, buffers);
    f32v squares{}, nats{};
    for_each_error(row, of, [&](int, f32v error) { squares = squares + error * error; });
    double* sums = p.partial + item * p.outputs();
    sums[0] = reduce_add(squares);
    if (!p.bound) continue;
    for_each_term(row, p.clip, of, [&](int i, const BoundTerm<f32v>& term) {
      nats = nats + inside(chunk, i, term.nats);
    });
    sums[1] = reduce_add(nats);
  }
}

void diffusion_loss_total(const DiffusionLossParams& p, int64_t begin, int64_t end) {
  const int64_t per_sample = chunks(p.elements), outputs = p.outputs();
  for (int64_t n = begin; n < end; ++n) {
    double sums[2] = {};
    for (int64_t c = 0; c < per_sample; ++c)
      for (int64_t k = 0; k < outputs; ++k) sums[k] += p.partial[(n * per_sample + c) * outputs + k];
    p.loss[n * outputs] =
        float(sums[0] / double(p.elements) * row_of(p, n).weight * (p.weights ? p.weights[n] : 1.0f));
    if (p.bound) p.loss[n * outputs + 1] = float(sums[1] / double(p.elements) * kBitsPerNat);
  }
}

void diffusion_loss_backward(const DiffusionLossParams& p, int64_t begin, int64_t end) {
  Buffers& buffers = scratch<Buffers>();
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunk_of(item, p.elements), second_half = second_half_of(p, chunk);
    const int64_t n = chunk.sample;
    const LossRow row = row_of(p, n);
    const Operands of = operands_of(p, chunk, buffers);
    const LossSlopes slopes =
        loss_slopes(row, p.elements, p.weights ? p.weights[n] : 1.0f, p.bound, p.grad_loss + n * p.outputs());
    float* grad = target(p.grad_out, chunk, buffers.grad_out);
    float* log_var_grad = p.learned_variance ? target(p.grad_out, second_half, buffers.grad_second_half) : nullptr;

    for_each_error(row, of, [&](int i, f32v error) { store(grad + i, slopes.of_error * error); });
    if (p.bound && (log_var_grad || !p.stop_mean)) {
      for_each_term(row, p.clip, of, [&](int i, const BoundTerm<f32v>& term) {
        if (!p.stop_mean) store(grad + i, load(grad + i) + slopes.of_mean * term.by_mean);
        if (log_var_grad) store(log_var_grad + i, slopes.of_log_var * term.by_log_var);
      });
    } else if (log_var_grad) {
      for (int i = 0; i < chunk.padded(); i += kLanes) store(log_var_grad + i, f32v{});
    }
    commit(p.grad_out, chunk, buffers.grad_out);
    if (log_var_grad) commit(p.grad_out, second_half, buffers.grad_second_half);
  }
}

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
