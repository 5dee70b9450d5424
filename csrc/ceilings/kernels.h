// Loops that do one thing as fast as a CPU level can: what the benchmarks call a ceiling. One table per CPU level.
#pragma once

#include <cstdint>

#include "core/cpu_dispatch.h"

namespace fastlm::ceilings {

// Runs `rounds` rounds inside the registers; returns the operations done. `sink` takes one value so that nothing is left out.
using RegisterLoop = double (*)(int64_t rounds, float* sink);
// Walks once over `count` floats, a multiple of 1024, 64-byte aligned; returns the bytes that crossed the memory bus.
using ReadLoop = double (*)(const float* from, int64_t count, float* sink);
using CopyLoop = double (*)(float* to, const float* from, int64_t count);

struct Kernels {
  RegisterLoop fma;       // fp32 multiply-add, counted as two operations (mul and add instructions on `default`)
  RegisterLoop exp2;      // exp2_fast of simd/math.h, one operation per value
  RegisterLoop dot_bf16;  // products and sums of bf16 pairs into fp32; nullptr where the level has no instruction for it
  ReadLoop read;
  CopyLoop copy;  // non-temporal stores: bytes read plus bytes written
};

}  // namespace fastlm::ceilings

FASTLM_DECLARE_CPU_KERNELS(ceilings::Kernels, ceiling_kernels)
