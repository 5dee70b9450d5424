// Tables of CPU kernels: every level defines one object of the same struct; the adapters pick the one of the level in use.
#pragma once

#include "core/cpu_capability.h"

#if FASTLM_HAVE_AVX2
#define FASTLM_IF_AVX2(...) __VA_ARGS__
#else
#define FASTLM_IF_AVX2(...)
#endif
#if FASTLM_HAVE_AVX512
#define FASTLM_IF_AVX512(...) __VA_ARGS__
#else
#define FASTLM_IF_AVX512(...)
#endif
#if FASTLM_HAVE_AVX512_BF16
#define FASTLM_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FASTLM_IF_AVX512_BF16(...)
#endif

// In <op>/cpu/kernels.h, outside any namespace: declares `Table` objects called `name`, one per level.
#define FASTLM_DECLARE_CPU_KERNELS(Table, name)                           \
  namespace fastlm::default_ {                                            \
  extern const Table name;                                                \
  }                                                                       \
  FASTLM_IF_AVX2(namespace fastlm::avx2 { extern const Table name; })     \
  FASTLM_IF_AVX512(namespace fastlm::avx512 { extern const Table name; }) \
  FASTLM_IF_AVX512_BF16(namespace fastlm::avx512_bf16 { extern const Table name; })

// The same for families without a bf16 dot product: on avx512_bf16 they use their avx512 kernels, so they are compiled once.
#define FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(Table, name)                 \
  namespace fastlm::default_ {                                            \
  extern const Table name;                                                \
  }                                                                       \
  FASTLM_IF_AVX2(namespace fastlm::avx2 { extern const Table name; })     \
  FASTLM_IF_AVX512(namespace fastlm::avx512 { extern const Table name; }) \
  FASTLM_IF_AVX512_BF16(                                                  \
      namespace fastlm::avx512_bf16 { [[maybe_unused]] static constexpr const Table& name = ::fastlm::avx512::name; })

// In <op>/cpu.cpp: the table of the level in use, `const Table&`.
#define FASTLM_CPU_KERNELS(name)                                                                         \
  (*[]() {                                                                                               \
    switch (::fastlm::cpu_level()) {                                                                     \
      FASTLM_IF_AVX512_BF16(case ::fastlm::CpuLevel::kAvx512Bf16 : return &::fastlm::avx512_bf16::name;) \
      FASTLM_IF_AVX512(case ::fastlm::CpuLevel::kAvx512 : return &::fastlm::avx512::name;)               \
      FASTLM_IF_AVX2(case ::fastlm::CpuLevel::kAvx2 : return &::fastlm::avx2::name;)                     \
      default:                                                                                           \
        return &::fastlm::default_::name;                                                                \
    }                                                                                                    \
  }())
