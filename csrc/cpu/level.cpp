// Which level's kernels run.

#if defined(DIFFKERN_BFLOAT16_LEVELS)
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
#if defined(__x86_64__) && !defined(DIFFKERN_PORTABLE)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#if defined(DIFFKERN_BFLOAT16_LEVELS)
// Those that have a use for instructions of bfloat16.
#define DIFFKERN_BFLOAT16_KERNELS(X)      \
  X(attention_terms, AttentionParams)     \
  X(conv_bf16, ConvParams)                \
  X(group_norm_silu, GroupNormSiluParams)
#define DIFFKERN_DECLARE(name, Params) void name(const Params&, int64_t begin, int64_t end);
namespace avx512_bf16 {
DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_DECLARE)
}
namespace avx512_amx {
DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_DECLARE)
}
#undef DIFFKERN_DECLARE
#endif
#endif

namespace {

#if defined(DIFFKERN_BFLOAT16_LEVELS)

// The AVX-512 kernels, but for those of a later level.
#define DIFFKERN_REPLACE(name, Params) kernels.name = name;
Kernels with_avx512_bf16() {
  using namespace avx512_bf16;
  Kernels kernels = avx512::kernels;
  DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_REPLACE)
  return kernels;
}
Kernels with_avx512_amx() {
  using namespace avx512_amx;
  Kernels kernels = avx512::kernels;
  DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_REPLACE)
  return kernels;
}
#undef DIFFKERN_REPLACE

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

// Every level that was compiled, the best first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> levels;
#if defined(__x86_64__) && !defined(DIFFKERN_PORTABLE)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if defined(DIFFKERN_BFLOAT16_LEVELS)
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    levels.push_back({"avx512_amx", has_bf16 && may_use_amx(), with_avx512_amx()});
    levels.push_back({"avx512_bf16", has_bf16, with_avx512_bf16()});
#endif
    levels.push_back({"avx512", has_avx512, avx512::kernels});
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
  if (forced)
    for (const Candidate& level : candidates())
      if (std::strcmp(level.name, wanted) == 0) {
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
