// A row of the table that says what a sampler does in one step. ops/reverse_step/row.h reads it, update.h applies it.
//
// A long row has the columns of `Columns`, then k_j for each slot of the history, and zeros up to a multiple of 4. Its
// noise has an address of its own, beside the table. A short row has kShortColumns columns,
//     p_x p_o k_x k_o k_0 sigma log_var_min log_var_max t
// and then k_j. Its noise is that of t; its limit and its guidance weight are arguments of the op.

#pragma once

#include <cstdint>

#include "lanes/lanes.h"

namespace diffkern {

struct alignas(16) Columns {
  float p_x, p_o, p_g, limit;                  // x0_hat from x, the output o and the gradient g, within +-limit
  float k_x, k_o, k_u, k_0;                    // x_next from x, o, out_uncond and x0_hat,
  float k_g, sigma, log_var_min, log_var_max;  // from g and from z. A learned variance lies between the two
  float w, q_x, q_o, q_0;                      // the weight of guidance; what is kept from x, o and x0_hat
  float b_0, b_z, unused[2];                   // what the mask blends in, from the known x_0 and from its noise
};

constexpr int kShortColumns = 9, kLongColumns = sizeof(Columns) / sizeof(float);

// A row as the kernels use it, whichever its length. A coefficient of 0 says that its operand is not read, but for p_x,
// p_o, k_x, k_o, k_0, and the k_j of a short row.
struct Row : Columns {
  const float* k_j;         // of the history
  bool reads_every_slot;    // of the history, whatever its k_j
  bool plain;               // it has no terms but those of short rows
  uint32_t address, count;  // z is the sum of the noises at address, address - 1, ... address - count + 1
  bool has_address;         // or there is no such noise: then sigma and b_z of a long row are NaN, if they are not 0
};

DIFFKERN_FN bool reads_slot(const Row& row, int slot) { return row.reads_every_slot || row.k_j[slot] != 0; }
DIFFKERN_FN bool blends(const Row& row) { return row.b_0 != 0 || row.b_z != 0; }

}  // namespace diffkern
