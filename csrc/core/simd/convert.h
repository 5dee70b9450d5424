// Loads and stores: memory of T (float, bfloat16, float16, double) <-> registers of fp32 or fp64. Rounding is to nearest even.
// `load`/`store` move a full vector from any address; the `_partial` forms touch exactly n elements (0 <= n <= lanes), the other
// lanes are zero. Included by simd.h.
#pragma once

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// ---- scalars ------------------------------------------------------------------------------------------------------

FASTLM_INLINE float to_acc(float x) { return x; }
FASTLM_INLINE double to_acc(double x) { return x; }

FASTLM_INLINE float to_acc(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return __builtin_bit_cast(float, bits);
}

FASTLM_INLINE float to_acc(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then let a multiplication by 2^112 fix the bias; it also normalises subnormals.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t bits;
  if (rest >= (0x7c00u << 13)) {
    bits = rest | 0x7f800000u;  // infinity and NaN keep their mantissa
  } else {
    bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) * 0x1p112f);
  }
  return __builtin_bit_cast(float, bits | sign);
#endif
}

template <class T>
FASTLM_INLINE T from_acc(acc_t<T> x);

template <>
FASTLM_INLINE float from_acc<float>(float x) {
  return x;
}
template <>
FASTLM_INLINE double from_acc<double>(double x) {
  return x;
}
template <>
FASTLM_INLINE bfloat16 from_acc<bfloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // keep NaN a (quiet) NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FASTLM_INLINE float16 from_acc<float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t mag = bits & 0x7fffffffu;
  uint32_t half;
  if (mag > 0x7f800000u) {
    half = 0x7e00u | ((mag >> 13) & 0x1ffu);
  } else if (mag >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (mag < 0x38800000u) {
    // Subnormal result: adding 0.5 lines the mantissa up at bit 0 and rounds it to nearest even.
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, mag) + 0.5f) - 0x3f000000u;
  } else {
    half = (mag + 0xc8000fffu + ((mag >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
#endif
}

// ---- full vectors -------------------------------------------------------------------------------------------------

FASTLM_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
FASTLM_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
FASTLM_INLINE VecF load(const bfloat16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(FASTLM_SIMD_256)
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (VecF)(__builtin_convertvector(h, VecI) << 16);
#endif
}
FASTLM_INLINE VecF load(const float16* p) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FASTLM_SIMD_256)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF v;
  for (int i = 0; i < kLanesF; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

FASTLM_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
FASTLM_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }
FASTLM_INLINE void store(bfloat16* p, VecF v) {
#if defined(__AVX512BF16__) && defined(FASTLM_SIMD_512)
  // Subnormal inputs become zero here, as the instruction defines it.
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof(h));
#else
  const VecI bits = (VecI)v;
  const VecI rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecI quiet = bits | 0x400000;
  const VecI top = ((v == v) ? rounded : quiet) >> 16;
#if defined(FASTLM_SIMD_256)
  // Pack the low halves of eight 32-bit lanes: saturation cannot bite once the upper halves are cleared.
  const __m256i low = (__m256i)(top & 0xffff);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const VecH h = __builtin_convertvector(top, VecH);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
#endif
}
// The bits of a vector of bf16, and of two of them in pairs, lane by lane: `low` in the lower halves.
FASTLM_INLINE VecH bf16_bits(VecF v) {
  bfloat16 half[kLanesF];
  store(half, v);
  VecH bits;
  __builtin_memcpy(&bits, half, sizeof(bits));
  return bits;
}
FASTLM_INLINE VecI widen(VecH h) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  return (VecI)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, VecI);
#endif
}
FASTLM_INLINE VecI pair_halves(VecH low, VecH high) { return widen(low) | (widen(high) << 16); }

FASTLM_INLINE void store(float16* p, VecF v) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(FASTLM_SIMD_256)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanesF; ++i) p[i] = from_acc<float16>(v[i]);
#endif
}

// ---- first n lanes ------------------------------------------------------------------------------------------------

template <class T>
FASTLM_INLINE vec_t<T> load_partial(const T* p, int64_t n) {
  T buffer[lanes_of<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
FASTLM_INLINE void store_partial(T* p, vec_t<T> v, int64_t n) {
  T buffer[lanes_of<T>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// Full when n >= lanes, else partial: for loops whose last vector may be short.
template <class T>
FASTLM_INLINE vec_t<T> load_upto(const T* p, int64_t n) {
  return n >= lanes_of<T> ? load(p) : load_partial(p, n);
}
template <class T>
FASTLM_INLINE void store_upto(T* p, vec_t<T> v, int64_t n) {
  if (n >= lanes_of<T>) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// ---- parameters whose dtype is only known at run time -------------------------------------------------------------

// Element i of an array of `dtype`, as A (float or double). A null pointer reads as `missing`.
template <class A>
FASTLM_INLINE A load_param(const void* p, DType dtype, int64_t i, A missing = A(0)) {
  if (p == nullptr) return missing;
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case DType::kBFloat16:
      return static_cast<A>(to_acc(static_cast<const bfloat16*>(p)[i]));
    case DType::kFloat16:
      return static_cast<A>(to_acc(static_cast<const float16*>(p)[i]));
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(p)[i]);
  }
  return missing;
}

// Element i of such an array becomes `value`, rounded to its dtype.
template <class A>
FASTLM_INLINE void store_param(void* p, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<bfloat16*>(p)[i] = from_acc<bfloat16>(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<float16*>(p)[i] = from_acc<float16>(static_cast<float>(value));
      break;
    case DType::kFloat64:
      static_cast<double*>(p)[i] = static_cast<double>(value);
      break;
  }
}

template <class E, class A>
FASTLM_INLINE void load_elements(const void* p, int64_t stride, int64_t first, int64_t count, A* to) {
  const E* from = static_cast<const E*>(p) + first * stride;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(to_acc(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(to_acc(from[i * stride]));
  }
}

// Elements first .. first + count - 1; the dtype is looked at once.
template <class A>
void load_params(const void* p, DType dtype, int64_t stride, int64_t first, int64_t count, A* to) {
  switch (dtype) {
    case DType::kFloat32:
      return load_elements<float>(p, stride, first, count, to);
    case DType::kBFloat16:
      return load_elements<bfloat16>(p, stride, first, count, to);
    case DType::kFloat16:
      return load_elements<float16>(p, stride, first, count, to);
    case DType::kFloat64:
      return load_elements<double>(p, stride, first, count, to);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
