// A sample's row of the table, in the form of math/row.h: the only place that knows short rows and long ones.

#pragma once

#include "integers.h"
#include "math/row.h"
#include "params.h"

namespace diffkern {

// The columns of a long row that has so many slots of history.
constexpr int64_t long_columns(int64_t history) { return kLongColumns + divide_up(history, 4) * 4; }

DIFFKERN_FN Row read_row(const ReverseStepParams& p, int64_t number) {
  const float* columns = p.table + number * p.columns;
  Row row;
  if (p.columns < kLongColumns) {
    row.p_x = columns[0], row.p_o = columns[1], row.p_g = 0, row.limit = p.clip ? 1.0f : __builtin_huge_valf();
    row.k_x = columns[2], row.k_o = columns[3], row.k_u = 0, row.k_0 = columns[4];
    row.k_g = 0, row.sigma = columns[5], row.log_var_min = columns[6], row.log_var_max = columns[7];
    row.w = p.guidance, row.q_x = row.q_o = 0, row.q_0 = 1;
    row.b_0 = row.b_z = 0;
    row.k_j = columns + kShortColumns;
    row.reads_every_slot = row.plain = true;
    const float t = columns[8];
    row.has_address = t >= 0 && t < 0x1p32f;
    row.address = row.has_address ? uint32_t(t) : 0, row.count = 1;
    return row;
  }
  static_cast<Columns&>(row) = *reinterpret_cast<const Columns*>(columns);
  row.k_j = columns + kLongColumns;
  row.reads_every_slot = false;
  if (!p.out.data) row.p_o = row.k_o = row.q_o = 0;
  if (!p.out_uncond.data) row.k_u = 0;
  if (!p.grad.data) row.p_g = row.k_g = 0;
  if (p.learned_variance && row.sigma == 0) row.k_g = 0;  // the variance is
  if (!p.mask.data) row.b_0 = row.b_z = 0;
  const int64_t address = p.address ? p.address[2 * number] : -1, count = p.address ? p.address[2 * number + 1] : 1;
  row.has_address = address < int64_t(1) << 32 && count >= 1 && count <= address + 1;
  row.address = row.has_address ? uint32_t(address) : 0, row.count = row.has_address ? uint32_t(count) : 1;
  if (!row.has_address && row.sigma != 0) row.sigma = __builtin_nanf("");
  if (!row.has_address && row.b_z != 0) row.b_z = __builtin_nanf("");
  row.plain = p.out.data && row.p_g == 0 && row.k_u == 0 && row.k_g == 0 && row.q_x == 0 && row.q_o == 0 &&
              row.q_0 == 1 && row.count == 1 && row.b_0 == 0 && row.b_z == 0;
  return row;
}

}  // namespace diffkern
