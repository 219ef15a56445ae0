// Which level's kernels run. CMake defines DIFFKERN_BUILT_<level> for each level of levels.def, as 1 or 0.

#if DIFFKERN_BUILT_avx512_amx
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "kernels.h"

namespace diffkern::cpu {

// DIFFKERN_IF(DIFFKERN_BUILT_avx2, code) is the code if that level is built, or nothing.
#define DIFFKERN_IF(built, ...) DIFFKERN_IF_VALUE(built, __VA_ARGS__)
#define DIFFKERN_IF_VALUE(value, ...) DIFFKERN_IF_##value(__VA_ARGS__)
#define DIFFKERN_IF_1(...) __VA_ARGS__
#define DIFFKERN_IF_0(...)

// A level has all kernels, or those with a use for instructions of bfloat16, which replace the ones of the level before.
#define DIFFKERN_DECLARE(name, Params) void name(const Params&, int64_t begin, int64_t end);
#define DIFFKERN_REPLACE(name, Params) table.name = name;
#define DIFFKERN_KERNELS_all    \
  extern const Kernels kernels; \
  static void replace(Kernels& table) { table = kernels; }
#define DIFFKERN_KERNELS_bf16                 \
  DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_DECLARE) \
  static void replace(Kernels& table) { DIFFKERN_BFLOAT16_KERNELS(DIFFKERN_REPLACE) }

namespace baseline {
extern const Kernels kernels;
}
#define DIFFKERN_LEVEL(level, files, ...) \
  DIFFKERN_IF(DIFFKERN_BUILT_##level, namespace level { DIFFKERN_KERNELS_##files })
#include "levels.def"
#undef DIFFKERN_LEVEL

namespace {

#if DIFFKERN_BUILT_avx512_amx
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
    std::vector<Candidate> levels{{"baseline", true, baseline::kernels}};
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define has(instructions) __builtin_cpu_supports(instructions)
#define DIFFKERN_LEVEL(level, files, flags, cpuinfo, here)                                     \
  DIFFKERN_IF(DIFFKERN_BUILT_##level, {                                                        \
    levels.insert(levels.begin(), {#level, levels[0].supported && (here), levels[0].kernels}); \
    level::replace(levels[0].kernels);                                                         \
  })
#include "levels.def"
#undef DIFFKERN_LEVEL
#undef has
    return levels;
  }();
  return all;
}

constexpr const char* kKnown[] = {
    "baseline",
#define DIFFKERN_LEVEL(level, ...) #level,
#include "levels.def"
#undef DIFFKERN_LEVEL
};

// Why DIFFKERN_CPU_LEVEL cannot have this value.
const char* refusal(const std::string& wanted) {
  for (const Candidate& level : candidates())
    if (level.name == wanted) return "this processor does not have it";
  if (std::find(std::begin(kKnown), std::end(kKnown), wanted) != std::end(kKnown)) return "this build does not have it";
  static const std::string expected = [] {
    std::string names = "expected ";
    for (const char* const* name = std::begin(kKnown); name != std::end(kKnown); ++name)
      names += (name == std::begin(kKnown) ? "" : name + 1 == std::end(kKnown) ? " or " : ", ") + std::string(*name);
    return names;
  }();
  return expected.c_str();
}

Level choose() {
  const char* variable = std::getenv("DIFFKERN_CPU_LEVEL");
  const std::string wanted = variable ? variable : "";
  for (const Candidate& level : candidates())
    if (level.supported && level.name == wanted) return {level.name, nullptr, level.kernels};
  for (const Candidate& level : candidates())
    if (level.supported) return {level.name, wanted.empty() ? nullptr : refusal(wanted), level.kernels};
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
