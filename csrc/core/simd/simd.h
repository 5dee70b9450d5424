// Vectors of one CPU level. Included only by files that are compiled once per level with FASTLM_CPU_LEVEL set.
//
// A vector is a compiler vector type (GCC and Clang): + - * / and comparisons work on it as written, `mask ? a : b` selects.
// What the compiler does not know (conversions of 16-bit floats, fused multiply-add, exponentials) is in this folder:
//   simd.h    types, load, store, fma, reductions      convert.h  bf16 and half <-> fp32      math.h  exp, log, sigmoid, ...
// Everything sits in an anonymous namespace: no symbol of one level can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtypes.h"
#include "core/integers.h"

#if defined(FASTLM_EMULATE_AVX512)
#include "core/simd/emulate_avx512.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTLM_CPU_LEVEL
#error "simd.h is for files compiled once per CPU level"
#endif

#define FASTLM_INLINE inline __attribute__((always_inline))

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define FASTLM_SIMD_512 1
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#define FASTLM_SIMD_256 1
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));
// 16-bit elements, as many as a VecF has lanes.
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));

constexpr int kLanesF = kVectorBytes / 4;
constexpr int kLanesD = kVectorBytes / 8;

// The vector that a tensor of T is computed in.
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VecF;
  using mask = VecI;
  static constexpr int lanes = kLanesF;
};
template <>
struct VectorOf<double> {
  using type = VecD;
  using mask = VecL;
  static constexpr int lanes = kLanesD;
};
template <class T>
using vec_t = typename VectorOf<acc_t<T>>::type;
template <class T>
constexpr int lanes_of = VectorOf<acc_t<T>>::lanes;

// ---- construction -------------------------------------------------------------------------------------------------

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<VecF> {
  using type = float;
};
template <>
struct ScalarOf<VecD> {
  using type = double;
};

template <class V>
FASTLM_INLINE V broadcast(typename ScalarOf<V>::type x) {
  return x - V{};  // the compiler turns this into one broadcast; V{} + x would change -0
}

template <class V>
FASTLM_INLINE V zero() {
  return V{};
}

// ---- multiply-add -------------------------------------------------------------------------------------------------

// a * b + c, with one rounding on levels that have the instruction and two on `default`.
FASTLM_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTLM_SIMD_256)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

FASTLM_INLINE VecD fma(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FASTLM_SIMD_256)
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a < b ? a : b and a > b ? a : b: b where either is NaN. One instruction, which the compiler does not find by itself.
FASTLM_INLINE VecF min(VecF a, VecF b) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(FASTLM_SIMD_256)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (VecF)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
FASTLM_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(FASTLM_SIMD_256)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FASTLM_INLINE VecD min(VecD a, VecD b) { return a < b ? a : b; }
FASTLM_INLINE VecD max(VecD a, VecD b) { return a > b ? a : b; }

// ---- reductions over lanes (fixed order: halves, then quarters, ...) ----------------------------------------------

template <class V>
FASTLM_INLINE typename ScalarOf<V>::type reduce_add(V v) {
  constexpr int n = sizeof(V) / sizeof(typename ScalarOf<V>::type);
  typename ScalarOf<V>::type lane[n];
  __builtin_memcpy(lane, &v, sizeof(V));
  for (int width = n / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <class V>
FASTLM_INLINE typename ScalarOf<V>::type reduce_max(V v) {
  constexpr int n = sizeof(V) / sizeof(typename ScalarOf<V>::type);
  typename ScalarOf<V>::type lane[n];
  __builtin_memcpy(lane, &v, sizeof(V));
  for (int width = n / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL

#include "core/simd/convert.h"
#include "core/simd/math.h"
