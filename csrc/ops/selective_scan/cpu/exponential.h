// The exponentials of the scan. Per state and position there is one 2^x; per channel and position one softplus and one sigmoid.
// All share one core: x = n + r with integer n, 2^r by core's degree-5 polynomial (relative error 9e-8), n into the exponent.
// fp64 goes through libm, lane by lane: it serves gradient checks.
#pragma once

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// |x| up to here: 2^x and every step towards it are normal numbers.
constexpr float kExp2Range = 125.0f;

// x[i] <- 2^x[i] for kCount vectors at once, so that their dependency chains overlap. kInRange: the caller knows that every |x|
// is at most kExp2Range, and no clamping is needed; in that range both forms give the same bits. Outside, results below 2^-126
// are subnormal or 0, and those above 2^127.5 infinity; NaN stays NaN.
template <bool kInRange, int kCount>
FASTLM_INLINE void exp2_each(VecF* x) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  if constexpr (!kInRange) {  // with a rounding and a scaling instruction
    for (int i = 0; i < kCount; ++i) {
      x[i] = min(broadcast<VecF>(200.0f), max(broadcast<VecF>(-200.0f), x[i]));
      const __m512 n = _mm512_roundscale_ps((__m512)x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      x[i] = (VecF)_mm512_scalef_ps((__m512)exp2_poly5(x[i] - (VecF)n), n);
    }
    return;
  }
#endif
  const VecF magic = broadcast<VecF>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  VecF t[kCount], r[kCount], y[kCount];
  if constexpr (!kInRange) {
    for (int i = 0; i < kCount; ++i) {
      // Constants first: NaN stays NaN.
      x[i] = min(broadcast<VecF>(128.0f), max(broadcast<VecF>(-127.0f), x[i]));
    }
  }
  for (int i = 0; i < kCount; ++i) t[i] = x[i] + magic;
  for (int i = 0; i < kCount; ++i) r[i] = x[i] - (t[i] - magic);
  for (int i = 0; i < kCount; ++i) y[i] = exp2_poly5(r[i]);
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kInRange) {
      x[i] = (VecF)((VecI)y[i] + ((VecI)t[i] << 23));
    } else {
      x[i] = y[i] * (VecF)((((VecI)t[i] - (VecI)magic) + 127) << 23);
    }
  }
}
template <bool kInRange, int kCount>
FASTLM_INLINE void exp2_each(VecD* x) {
  for (int i = 0; i < kCount; ++i) x[i] = exp2_fast(x[i]);
}

// e^x for -87 <= x <= 87, relative error 3e-7; NaN stays NaN.
FASTLM_INLINE VecF exp_bounded(VecF x) {
  const VecF magic = broadcast<VecF>(12582912.0f + 127.0f);  // the low bits become n + 127, the exponent field of 2^n
  const VecF t = fma(x, broadcast<VecF>(kLog2e), magic);
  const VecF r = fma(x, broadcast<VecF>(kLog2e), magic - t);
  return exp2_poly5(r) * (VecF)((VecI)t << 23);
}

// x + log(1 + e) for e in [0, 1], the logarithm with relative error 1.5e-7: e times a minimax polynomial.
FASTLM_INLINE VecF add_log1p(VecF x, VecF e) {
  VecF p = broadcast<VecF>(-3.2439830247e-3f);
  p = fma(p, e, broadcast<VecF>(1.98512766510e-2f));
  p = fma(p, e, broadcast<VecF>(-5.69591969252e-2f));
  p = fma(p, e, broadcast<VecF>(1.06036223471e-1f));
  p = fma(p, e, broadcast<VecF>(-1.53055742383e-1f));
  p = fma(p, e, broadcast<VecF>(1.96759328246e-1f));
  p = fma(p, e, broadcast<VecF>(-2.49541327357e-1f));
  p = fma(p, e, broadcast<VecF>(3.33299636841e-1f));
  p = fma(p, e, broadcast<VecF>(-4.99999016523e-1f));
  p = fma(p, e, broadcast<VecF>(1.0f));
  return fma(p, e, x);
}

// e^-|x|, but no less than 1.6e-38.
FASTLM_INLINE VecF exp_minus_abs(VecF x) { return exp_bounded(max(broadcast<VecF>(-87.0f), (VecF)((VecI)x | INT32_MIN))); }

// 1 / (1 + e^-x), no less than 1.6e-38.
FASTLM_INLINE VecF gate_sigmoid(VecF x) {
  const VecF e = exp_bounded(min(broadcast<VecF>(87.0f), max(broadcast<VecF>(-87.0f), -x)));
  return 1.0f / (1.0f + e);
}
FASTLM_INLINE VecD gate_sigmoid(VecD x) { return sigmoid(x); }

// Step size. In fp32 log(1 + e^x) equals x from x = 17 on, so the threshold of 20 beyond which softplus is the identity needs no
// test.
FASTLM_INLINE VecF step_softplus(VecF x) { return add_log1p(max(x, zero<VecF>()), exp_minus_abs(x)); }
FASTLM_INLINE VecD step_softplus(VecD x) { return softplus(x); }

// Step size and its derivative by the raw value.
FASTLM_INLINE VecF step_softplus(VecF x, VecF* slope) {
  const VecF e = exp_minus_abs(x);
  *slope = (x < 0.0f ? e : broadcast<VecF>(1.0f)) / (1.0f + e);
  return add_log1p(max(x, zero<VecF>()), e);
}
FASTLM_INLINE VecD step_softplus(VecD x, VecD* slope) {
  *slope = x > 20.0 ? broadcast<VecD>(1.0) : sigmoid(x);
  return softplus(x);
}

FASTLM_INLINE VecF absolute(VecF x) { return (VecF)((VecI)x & INT32_MAX); }
FASTLM_INLINE VecD absolute(VecD x) { return (VecD)((VecL)x & INT64_MAX); }

template <class M>
FASTLM_INLINE bool all_lanes(M mask) {
  bool all = true;
  for (size_t i = 0; i < sizeof(M) / sizeof(mask[0]); ++i) all = all && mask[i] != 0;
  return all;
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
