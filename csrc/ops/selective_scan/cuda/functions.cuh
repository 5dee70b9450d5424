// The functions of the scan on the device: fast forms in fp32, exact ones in fp64.
#pragma once

#include "core/cuda/device.cuh"

namespace fastlm::selective_scan::cuda {

constexpr double kLog2e = 1.4426950408889634;

// 2^x on the special-function unit; relative error 2^-22, results below 2^-126 are 0: a full reset of the state.
__device__ __forceinline__ float power_of_two(float x) { return fastlm::cuda::exp2_approx(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

// The same from multiply-adds, for a share of the exponentials where those units have nothing else to do: 2^n 2^f with |f| <=
// 1/2, the second factor as a polynomial (degree 5, fitted for this file by reweighted least squares: relative error 2e-7 after
// rounding).
__device__ __forceinline__ float power_of_two_fma(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const float sum = x + kRound;
  const float f = x - (sum - kRound);
  float p = 1.326472831e-3f;
  p = fmaf(p, f, 9.671512843e-3f);
  p = fmaf(p, f, 5.550733739e-2f);
  p = fmaf(p, f, 2.402224208e-1f);
  p = fmaf(p, f, 6.931469776e-1f);
  p = fmaf(p, f, 1.0f);
  const float y = __uint_as_float(__float_as_uint(p) + (__float_as_uint(sum) << 23));
  if (x < -126.0f) return 0.0f;
  return x > 127.0f ? power_of_two(x) : y;
}

// log(1 + exp(x)), x itself above 20. log(1 + e) = 2 artanh(e / (2 + e)), whose series in s = e / (2 + e) keeps its relative
// precision for small e, where 1 + e would have lost e's last digits; the coefficients are fitted like those above (4e-9).
// kExact: the rounding error of the exponent's product, which would be that of e times |x|, is put back; inputs of 16 bits do not
// need it.
template <bool kExact>
__device__ __forceinline__ float softplus(float x) {
  constexpr float kHigh = static_cast<float>(kLog2e), kLow = static_cast<float>(kLog2e - static_cast<double>(kHigh));
  const float size = fabsf(x), exponent = -size * kHigh;
  float e = power_of_two(exponent);
  if constexpr (kExact) {
    const float rest = fmaf(-size, kHigh, -exponent) - size * kLow;
    e = fmaf(e, rest * 0.69314718f, e);
  }
  const float s = e * fastlm::cuda::rcp_approx(2.0f + e);
  const float s2 = s * s;
  float p = 2.817833117e-1f;
  p = fmaf(p, s2, 2.796060359e-1f);
  p = fmaf(p, s2, 4.002491022e-1f);
  p = fmaf(p, s2, 6.666631468e-1f);
  p = fmaf(p, s2, 2.000000008f);
  const float y = fmaf(p, s, fmaxf(x, 0.0f));  // rounds to x above 20
  if constexpr (kExact) {                      // what is too large for the product has no rest; NaN stays
    if (x > 20.0f) return x;
    return x < -126.0f ? 0.0f : y;
  }
  return y;
}
template <bool kExact>
__device__ __forceinline__ double softplus(double x) {
  return x <= 20.0 ? log1p(exp(x)) : x;
}

// x sigmoid(x).
__device__ __forceinline__ float silu(float x) {
  return x * fastlm::cuda::rcp_approx(1.0f + power_of_two(-x * static_cast<float>(kLog2e)));
}
__device__ __forceinline__ double silu(double x) { return x / (1.0 + exp(-x)); }

}  // namespace fastlm::selective_scan::cuda
