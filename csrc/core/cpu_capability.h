// CPU levels: one set of kernels per level is compiled; the level in use is chosen when the library is loaded.
#pragma once

#include "core/export.h"

namespace fastlm {

enum class CpuLevel : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kNumCpuLevels = 4;

// "default", "avx2", "avx512", "avx512_bf16".
FASTLM_API const char* cpu_level_name(CpuLevel level);

// Was this level compiled into the library?
FASTLM_API bool cpu_level_built(CpuLevel level);

// Can this machine run the level (instructions and operating system support)?
FASTLM_API bool cpu_level_supported(CpuLevel level);

// The level in use: the highest one that is built and supported, or the lower one named by FASTLM_CPU_CAPABILITY.
FASTLM_API CpuLevel cpu_level();

// Changes the level in use for the whole process. Returns nullptr, or the reason why nothing changed.
FASTLM_API const char* set_cpu_level(const char* name);

// What was wrong with FASTLM_CPU_CAPABILITY at load time, or nullptr.
FASTLM_API const char* cpu_capability_problem();

}  // namespace fastlm
