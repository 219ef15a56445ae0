// Which level's kernels run. CMake defines DIFFKERN_LEVEL_<level> for each level that it builds.

#if defined(DIFFKERN_LEVEL_avx512_amx)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace diffkern::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(DIFFKERN_LEVEL_avx2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(DIFFKERN_LEVEL_avx512)
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The AVX-512 kernels, but for those that have a use for instructions of bfloat16.
#define DIFFKERN_BFLOAT16_KERNELS(X)      \
  X(attention_terms, AttentionParams)     \
  X(conv_bf16, ConvParams)                \
  X(group_norm_silu, GroupNormSiluParams)
#define DIFFKERN_DECLARE(name, Params) void name(const Params&, int64_t begin, int64_t end);
#define DIFFKERN_REPLACE(name, Params) all.name = name;
#define DIFFKERN_BFLOAT16_LEVEL(level)          \
  namespace level {                             \
  DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_DECLARE)   \
  static Kernels kernels() {                    \
    Kernels all = avx512::kernels;              \
    DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_REPLACE) \
    return all;                                 \
  }                                             \
  }
#if defined(DIFFKERN_LEVEL_avx512_bf16)
DIFFKERN_BFLOAT16_LEVEL(avx512_bf16)
#endif
#if defined(DIFFKERN_LEVEL_avx512_amx)
DIFFKERN_BFLOAT16_LEVEL(avx512_amx)
#endif

namespace {

#if defined(DIFFKERN_LEVEL_avx512_amx)
// The tiles are 8 KB of a thread's state, which a process has to ask Linux for.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

#endif

struct Candidate {
  const char* name;
  bool supported;
  Kernels kernels;
};

// Every level that was built, the best first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> levels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(DIFFKERN_LEVEL_avx512_amx)
    levels.push_back({"avx512_amx", has_avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx(),
                      avx512_amx::kernels()});
#endif
#if defined(DIFFKERN_LEVEL_avx512_bf16)
    levels.push_back({"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), avx512_bf16::kernels()});
#endif
#if defined(DIFFKERN_LEVEL_avx512)
    levels.push_back({"avx512", has_avx512, avx512::kernels});
#endif
#if defined(DIFFKERN_LEVEL_avx2)
    levels.push_back({"avx2", has_avx2, avx2::kernels});
#endif
    levels.push_back({"baseline", true, baseline::kernels});
    return levels;
  }();
  return all;
}

Level choose() {
  const char* wanted = std::getenv("DIFFKERN_CPU_LEVEL");
  const bool forced = wanted != nullptr && *wanted != '\0';
  const char* error = forced ? "expected baseline, avx2, avx512, avx512_bf16 or avx512_amx" : nullptr;
  for (const char* known : {"avx2", "avx512", "avx512_bf16", "avx512_amx"})
    if (forced && std::strcmp(known, wanted) == 0) error = "this build does not have it";
  for (const Candidate& level : candidates())
    if (forced && std::strcmp(level.name, wanted) == 0) {
      if (level.supported) return {level.name, nullptr, level.kernels};
      error = "this processor does not have it";
    }
  for (const Candidate& level : candidates())
    if (level.supported) return {level.name, error, level.kernels};
  __builtin_unreachable();
}

}  // namespace

std::vector<const char*> supported_levels() {
  std::vector<const char*> names;
  for (const Candidate& level : candidates())
    if (level.supported) names.push_back(level.name);
  return names;
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace diffkern::cpu
