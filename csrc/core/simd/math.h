// exp, log and the activations built on them, for vectors of fp32 (polynomials, error below 2 units in the last place unless
// said otherwise) and fp64 (libm per lane: float64 serves gradient checks, not speed). NaN in, NaN out. Included by simd.h.
#pragma once

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// 2^r for |r| <= 0.5: minimax polynomials with constant term 1 (so that 2^0 is exactly 1), relative error 9.2e-8 (degree 5)
// or 2.0e-9 (degree 6) before rounding.
FASTLM_INLINE VecF exp2_poly5(VecF r) {
  VecF p = broadcast<VecF>(1.326472724e-3f);
  p = fma(p, r, broadcast<VecF>(9.671512681e-3f));
  p = fma(p, r, broadcast<VecF>(5.550733744e-2f));
  p = fma(p, r, broadcast<VecF>(2.402224208e-1f));
  p = fma(p, r, broadcast<VecF>(6.931469776e-1f));
  return fma(p, r, broadcast<VecF>(1.0f));
}
FASTLM_INLINE VecF exp2_poly6(VecF r) {
  VecF p = broadcast<VecF>(1.535336200e-4f);
  p = fma(p, r, broadcast<VecF>(1.339887445e-3f));
  p = fma(p, r, broadcast<VecF>(9.618437358e-3f));
  p = fma(p, r, broadcast<VecF>(5.550332471e-2f));
  p = fma(p, r, broadcast<VecF>(2.402264791e-1f));
  p = fma(p, r, broadcast<VecF>(6.931472029e-1f));
  return fma(p, r, broadcast<VecF>(1.0f));
}

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x, relative error 2e-7. Results below 2^-126 are 0, above 2^127.5 infinity. The hot loops' exponential: 11 instructions
// on AVX2 (the exponent is built by integer shift), 8 on AVX-512 (vscalefps).
FASTLM_INLINE VecF exp2_fast(VecF x) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (VecF)_mm512_scalef_ps((__m512)exp2_poly5(x - (VecF)n), n);
#else
  x = x < -127.0f ? broadcast<VecF>(-127.0f) : x;
  x = x > 128.0f ? broadcast<VecF>(128.0f) : x;
  // Adding 1.5 * 2^23 + 127 rounds x to an integer n and leaves n + 127 in the low bits.
  const VecF magic = broadcast<VecF>(12582912.0f + 127.0f);
  const VecF t = x + magic;
  const VecF r = x - (t - magic);
  const VecF scale = (VecF)((VecI)t << 23);
  return exp2_poly5(r) * scale;
#endif
}

// e^x over the whole range, subnormal results included.
FASTLM_INLINE VecF exp(VecF x) {
  x = x < -104.0f ? broadcast<VecF>(-104.0f) : x;
  x = x > 89.0f ? broadcast<VecF>(89.0f) : x;
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF t = fma(x, broadcast<VecF>(kLog2e), magic);
  const VecF n = t - magic;
  // r = x - n ln2 in two pieces, then in units of log2.
  VecF r = fma(n, broadcast<VecF>(-0.693359375f), x);
  r = fma(n, broadcast<VecF>(2.12194440e-4f), r);
  const VecF p = exp2_poly6(r * kLog2e);
  // Two steps of scaling: one alone would overflow at the upper end and flush subnormal results.
  const VecI e = (VecI)t - (VecI)magic;
  const VecI half = e >> 1;
  const VecF s1 = (VecF)((half + 127) << 23);
  const VecF s2 = (VecF)((e - half + 127) << 23);
  return x == x ? p * s1 * s2 : x;
}

FASTLM_INLINE VecD exp(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanesD; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}
FASTLM_INLINE VecD exp2_fast(VecD x) { return exp(x * 0.6931471805599453094); }

// 2^x for x <= 0: exp2_fast without the upper bound; -infinity gives exactly 0, as a masked score needs it.
FASTLM_INLINE VecF exp2_nonpositive(VecF x) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  x = max(broadcast<VecF>(-160.0f), x);  // this order keeps NaN
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (VecF)_mm512_scalef_ps((__m512)exp2_poly5(x - (VecF)n), n);
#else
  x = max(broadcast<VecF>(-127.0f), x);  // this order keeps NaN
  const VecF magic = broadcast<VecF>(12582912.0f + 127.0f);
  const VecF t = x + magic;
  return exp2_poly5(x - (t - magic)) * (VecF)((VecI)t << 23);
#endif
}
FASTLM_INLINE VecD exp2_nonpositive(VecD x) { return exp2_fast(x); }

// ln x for x > 0 (subnormals count as 2^-126); ln 0 = -inf, ln of a negative number is NaN.
FASTLM_INLINE VecF log(VecF x) {
  const VecF safe = x < 1.17549435e-38f ? broadcast<VecF>(1.17549435e-38f) : x;
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const VecI bits = (VecI)safe;
  const VecI e = (bits - 0x3f3504f3) >> 23;
  const VecF m = (VecF)(bits - (e << 23));
  const VecF f = m - 1.0f;
  const VecF s = f / (2.0f + f);
  const VecF z = s * s;
  VecF p = broadcast<VecF>(0.24279078841f);
  p = fma(p, z, broadcast<VecF>(0.28498786688f));
  p = fma(p, z, broadcast<VecF>(0.40000972152f));
  p = fma(p, z, broadcast<VecF>(0.66666662693f));
  const VecF ef = __builtin_convertvector(e, VecF);
  const VecF h = f * f * 0.5f;
  VecF y = s * (h + z * p) + ef * 9.0580006145e-6f;
  y = ef * 0.69313812256f + ((y - h) + f);
  const VecF inf = broadcast<VecF>(__builtin_inff());
  y = x == inf ? inf : y;
  y = x == 0.0f ? -inf : y;
  y = x < 0.0f ? broadcast<VecF>(__builtin_nanf("")) : y;
  return x == x ? y : x;
}
FASTLM_INLINE VecD log(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanesD; ++i) y[i] = __builtin_log(x[i]);
  return y;
}

// 1 / (1 + e^-x), without overflow for any x.
FASTLM_INLINE VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }
FASTLM_INLINE VecD sigmoid(VecD x) { return 1.0 / (1.0 + exp(-x)); }

template <class V>
FASTLM_INLINE V silu(V x) {
  return x * sigmoid(x);
}

// d silu(x) / dx.
template <class V>
FASTLM_INLINE V silu_grad(V x) {
  const V s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

// log(1 + e^x) up to x = 20, x itself beyond (torch's threshold).
FASTLM_INLINE VecF softplus(VecF x) {
  // log1p(e) = log(1 + e) * e / ((1 + e) - 1): the quotient repairs what rounding 1 + e lost.
  const VecF e = exp(x > 20.0f ? broadcast<VecF>(20.0f) : x);
  const VecF one_e = 1.0f + e;
  const VecF d = one_e - 1.0f;
  const VecF y = d == 0.0f ? e : log(one_e) * (e / d);
  return x > 20.0f ? x : y;
}
FASTLM_INLINE VecD softplus(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanesD; ++i) y[i] = x[i] > 20.0 ? x[i] : __builtin_log1p(__builtin_exp(x[i]));
  return y;
}

// (e^2x - 1) / (e^2x + 1) away from 0, an odd polynomial near it.
FASTLM_INLINE VecF tanh(VecF x) {
  const VecF a = x < 0.0f ? -x : x;
  const VecF z = x * x;
  VecF p = broadcast<VecF>(-5.70498872745e-3f);
  p = fma(p, z, broadcast<VecF>(2.06390887954e-2f));
  p = fma(p, z, broadcast<VecF>(-5.37397155531e-2f));
  p = fma(p, z, broadcast<VecF>(1.33314422036e-1f));
  p = fma(p, z, broadcast<VecF>(-3.33332819422e-1f));
  const VecF near = fma(p * z, x, x);
  const VecF e = exp(2.0f * (a > 10.0f ? broadcast<VecF>(10.0f) : a));
  const VecF big = 1.0f - 2.0f / (e + 1.0f);
  const VecF far = x < 0.0f ? -big : big;
  const VecF y = a < 0.625f ? near : far;
  return x == x ? y : x;
}
FASTLM_INLINE VecD tanh(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanesD; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

// One value through the vector code, so that scalar prologues round like the vectors beside them.
FASTLM_INLINE float exp(float x) { return exp(broadcast<VecF>(x))[0]; }
FASTLM_INLINE float sigmoid(float x) { return sigmoid(broadcast<VecF>(x))[0]; }
FASTLM_INLINE double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
FASTLM_INLINE float softplus(float x) { return softplus(broadcast<VecF>(x))[0]; }
FASTLM_INLINE double softplus(double x) { return x > 20.0 ? x : __builtin_log1p(__builtin_exp(x)); }

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
