// AVX-512 on a machine without it: intrinsics as plain code, from SIMDe (package libsimde-dev) and, where that lacks one, from
// here. Only for the test build FASTLM_EMULATE_AVX512: it shows that the AVX-512 paths compute the right numbers, never how fast.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

namespace fastlm::emulation {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

static inline __m512 cvtph_ps(__m256i h) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  __m512 v;
  __builtin_memcpy(&v, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
  return v;
}

static inline __m512i cvtepu16_epi32(__m256i h) { return (__m512i) __builtin_convertvector((Half16)h, Int16); }

static inline void stream_ps(float* p, __m512 v) { __builtin_memcpy(p, &v, sizeof(v)); }

static inline __m256i cvtps_ph(__m512 v) {
  __m256 low;
  __m256 high;
  __builtin_memcpy(&low, &v, 32);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

// To nearest even; subnormal inputs count as zero, as in the instruction.
static inline uint16_t bf16_bits(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline __m256bh cvtneps_pbh(__m512 v) {
  Half16 h;
  for (int i = 0; i < 16; ++i) h[i] = bf16_bits(((Float16)v)[i]);
  return (__m256bh)h;
}

static inline __m512bh cvtne2ps_pbh(__m512 upper, __m512 lower) {
  uint16_t h[32];
  for (int i = 0; i < 16; ++i) h[i] = bf16_bits(((Float16)lower)[i]);
  for (int i = 0; i < 16; ++i) h[16 + i] = bf16_bits(((Float16)upper)[i]);
  __m512bh out;
  __builtin_memcpy(&out, h, 64);
  return out;
}

// c + a.b over pairs of bf16. The instruction rounds to nearest even, takes subnormals as zero and does not round between its two
// products' sums in a fixed published order; fp32 arithmetic is within its error.
static inline __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  uint16_t x[32];
  uint16_t y[32];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  Float16 sum = (Float16)c;
  for (int i = 0; i < 16; ++i) {
    for (int j = 1; j >= 0; --j) {
      const float xf = __builtin_bit_cast(float, static_cast<uint32_t>(x[2 * i + j]) << 16);
      const float yf = __builtin_bit_cast(float, static_cast<uint32_t>(y[2 * i + j]) << 16);
      sum[i] += xf * yf;
    }
  }
  return (__m512)sum;
}

}  // namespace fastlm::emulation

#define _mm512_cvtepu16_epi32(h) ::fastlm::emulation::cvtepu16_epi32(h)
#define _mm512_stream_ps(p, v) ::fastlm::emulation::stream_ps(p, v)
#undef _mm512_cvtps_ph
#define _mm512_cvtph_ps(h) ::fastlm::emulation::cvtph_ps(h)
#define _mm512_cvtps_ph(v, rounding) ::fastlm::emulation::cvtps_ph(v)
#define _mm512_cvtneps_pbh(v) ::fastlm::emulation::cvtneps_pbh(v)
#define _mm512_cvtne2ps_pbh(a, b) ::fastlm::emulation::cvtne2ps_pbh(a, b)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(c, a, b) ::fastlm::emulation::dpbf16_ps(c, a, b)

// From here on the code takes its AVX-512 paths.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if FASTLM_EMULATE_AVX512 > 1
#define __AVX512BF16__ 1
#endif
