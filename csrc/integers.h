// Arithmetic of sizes.

#pragma once

#include <cstdint>

namespace diffkern {

static constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // for a >= 0: no overflow
static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace diffkern
