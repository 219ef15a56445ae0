// The kernels of one level, as a table. Compiled once per level.

#include "cpu/kernels.h"

namespace diffkern::cpu::DIFFKERN_CPU_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
#define DIFFKERN_ENTRY(name, Params) name,
    DIFFKERN_CPU_KERNELS(DIFFKERN_ENTRY)
#undef DIFFKERN_ENTRY
};

}  // namespace diffkern::cpu::DIFFKERN_CPU_LEVEL
