// Which level's kernels run.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace diffkern::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

Level choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  struct {
    const char* name;
    bool supported;
    const Kernels& kernels;
  } const levels[] = {{"avx512", has_avx512, avx512::kernels},
                      {"avx2", has_avx2, avx2::kernels},
                      {"baseline", true, baseline::kernels}};
#else
  struct {
    const char* name;
    bool supported;
    const Kernels& kernels;
  } const levels[] = {{"baseline", true, baseline::kernels}};
#endif

  const char* wanted = std::getenv("DIFFKERN_CPU_LEVEL");
  const bool forced = wanted != nullptr && *wanted != '\0';
  const char* error = forced ? "expected baseline, avx2 or avx512" : nullptr;
  if (forced)
    for (const auto& level : levels)
      if (std::strcmp(level.name, wanted) == 0) {
        if (level.supported) return {level.name, nullptr, level.kernels};
        error = "this processor does not have it";
      }
  for (const auto& level : levels)
    if (level.supported) return {level.name, error, level.kernels};
  __builtin_unreachable();
}

}  // namespace

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace diffkern::cpu
