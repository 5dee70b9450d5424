// Chooses the CPU level: what was compiled, what the machine has, what the user forces.
#include "core/cpu_capability.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastlm {
namespace {

constexpr const char* kNames[kNumCpuLevels] = {"default", "avx2", "avx512", "avx512_bf16"};

int find_level(const char* name) {
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

CpuLevel highest_level() {
  for (int i = kNumCpuLevels - 1; i > 0; --i) {
    const auto level = static_cast<CpuLevel>(i);
    if (cpu_level_built(level) && cpu_level_supported(level)) return level;
  }
  return CpuLevel::kDefault;
}

// Text of the last refusal; written before the pointer is handed out, read by the caller at once.
thread_local char g_reason[256];

const char* refusal(const char* name) {
  const int found = find_level(name);
  if (found < 0) {
    std::snprintf(g_reason, sizeof(g_reason),
                  "FASTLM_CPU_CAPABILITY must be one of default, avx2, avx512, avx512_bf16, got '%.64s'", name);
    return g_reason;
  }
  const auto level = static_cast<CpuLevel>(found);
  if (!cpu_level_built(level)) {
    std::snprintf(g_reason, sizeof(g_reason),
                  "FASTLM_CPU_CAPABILITY must name a level that was compiled, got '%s', which was not", name);
    return g_reason;
  }
  if (!cpu_level_supported(level)) {
    std::snprintf(g_reason, sizeof(g_reason), "FASTLM_CPU_CAPABILITY must name a level this CPU can run (up to '%s'), got '%s'",
                  cpu_level_name(highest_level()), name);
    return g_reason;
  }
  return nullptr;
}

struct Choice {
  std::atomic<int> level;
  char problem[256];

  Choice() : level(static_cast<int>(highest_level())), problem{} {
    const char* forced = std::getenv("FASTLM_CPU_CAPABILITY");
    if (forced == nullptr || *forced == '\0') return;
    if (const char* why = refusal(forced)) {
      std::snprintf(problem, sizeof(problem), "%s", why);
    } else {
      level = find_level(forced);
    }
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

}  // namespace

const char* cpu_level_name(CpuLevel level) { return kNames[static_cast<int>(level)]; }

bool cpu_level_built(CpuLevel level) {
  switch (level) {
    case CpuLevel::kDefault:
      return true;
    case CpuLevel::kAvx2:
      return FASTLM_HAVE_AVX2;
    case CpuLevel::kAvx512:
      return FASTLM_HAVE_AVX512;
    case CpuLevel::kAvx512Bf16:
      return FASTLM_HAVE_AVX512_BF16;
  }
  return false;
}

bool cpu_level_supported(CpuLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(FASTLM_EMULATED_LEVELS)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  switch (level) {
    case CpuLevel::kDefault:
      return true;
    case CpuLevel::kAvx2:
      return avx2;
    case CpuLevel::kAvx512:
      return avx512;
    case CpuLevel::kAvx512Bf16:
#if defined(FASTLM_EMULATED_LEVELS)
      return avx512;
#endif
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return level == CpuLevel::kDefault;
#endif
}

CpuLevel cpu_level() { return static_cast<CpuLevel>(choice().level.load(std::memory_order_relaxed)); }

const char* set_cpu_level(const char* name) {
  if (const char* why = refusal(name)) return why;
  choice().level.store(find_level(name), std::memory_order_relaxed);
  return nullptr;
}

const char* cpu_capability_problem() {
  const Choice& c = choice();
  return c.problem[0] == '\0' ? nullptr : c.problem;
}

}  // namespace fastlm
