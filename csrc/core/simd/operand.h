// What a register tile multiplies: fp32 and fp64 as they are, bf16 as pairs of consecutive depths where the CPU level has the dot
// instruction (avx512_bf16). `operand_t<T>` is what matrices of T are packed into before they meet in gemm.h.
#pragma once

#include "core/simd/simd.h"

#if !defined(FASTLM_BF16_DOT)
#if defined(__AVX512BF16__) && defined(FASTLM_SIMD_512)
#define FASTLM_BF16_DOT 1
#else
#define FASTLM_BF16_DOT 0  // 1 on another level: the pairs in plain arithmetic, to test their layouts
#endif
#endif

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Two bf16 values of consecutive depths, the first in the low half.
struct Bf16Pair {
  uint32_t bits;
};

template <class T>
struct OperandOf {
  using type = acc_t<T>;
};
#if FASTLM_BF16_DOT
template <>
struct OperandOf<bfloat16> {
  using type = Bf16Pair;
};
#endif
template <class T>
using operand_t = typename OperandOf<T>::type;

// acc: what products are summed in; vec: a vector of operands; kDepth: depths one operand holds.
template <class E>
struct OperandTraits {
  using acc = E;
  using vec = vec_t<E>;
  static constexpr int64_t kDepth = 1;
};
template <>
struct OperandTraits<Bf16Pair> {
  using acc = float;
  using vec = VecI;
  static constexpr int64_t kDepth = 2;
};
template <class E>
using operand_acc = typename OperandTraits<E>::acc;
template <class E>
using operand_vec = typename OperandTraits<E>::vec;
template <class E>
constexpr int64_t depth_per_operand = OperandTraits<E>::kDepth;

// Operands that `depth` values need.
template <class E>
FASTLM_INLINE int64_t operand_depth(int64_t depth) {
  return ceil_div(depth, depth_per_operand<E>);
}

FASTLM_INLINE VecF load_operands(const float* p) { return load(p); }
FASTLM_INLINE VecD load_operands(const double* p) { return load(p); }
FASTLM_INLINE VecI load_operands(const Bf16Pair* p) {
  VecI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

FASTLM_INLINE VecF broadcast_operand(float x) { return broadcast<VecF>(x); }
FASTLM_INLINE VecD broadcast_operand(double x) { return broadcast<VecD>(x); }
FASTLM_INLINE VecI broadcast_operand(Bf16Pair x) { return static_cast<int32_t>(x.bits) - VecI{}; }

FASTLM_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return fma(a, b, c); }
FASTLM_INLINE VecD multiply_add(VecD a, VecD b, VecD c) { return fma(a, b, c); }
FASTLM_INLINE VecF multiply_add(VecI a, VecI b, VecF c) {
#if FASTLM_BF16_DOT && defined(__AVX512BF16__) && defined(FASTLM_SIMD_512)
  __m512bh x, y;
  __builtin_memcpy(&x, &a, sizeof(x));
  __builtin_memcpy(&y, &b, sizeof(y));
  return (VecF)_mm512_dpbf16_ps((__m512)c, x, y);
#else
  const VecI high = broadcast_operand(Bf16Pair{0xffff0000u});
  c = fma((VecF)(a & high), (VecF)(b & high), c);
  return fma((VecF)(a << 16), (VecF)(b << 16), c);
#endif
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
