// Philox4x32-10 (core/philox.h) with a counter per lane: the same words, a vector of them at a time. Included after simd.h.
#pragma once

#include "core/philox.h"
#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecUL __attribute__((vector_size(kVectorBytes)));

FASTLM_INLINE VecU broadcast_word(uint32_t x) { return x + VecU{}; }

// Both halves of the 64-bit products of every lane.
FASTLM_INLINE void multiply_wide(VecU a, uint32_t b, VecU& high, VecU& low) {
#if defined(__SSE2__)
  // The instruction multiplies the even lanes; the odd ones are shifted to their places first.
  const VecU factor = broadcast_word(b);
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512)
  const VecUL even = (VecUL)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
  const VecUL odd = (VecUL)_mm512_mul_epu32((__m512i)((VecUL)a >> 32), (__m512i)factor);
#elif defined(FASTLM_SIMD_256)
  const VecUL even = (VecUL)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
  const VecUL odd = (VecUL)_mm256_mul_epu32((__m256i)((VecUL)a >> 32), (__m256i)factor);
#else
  const VecUL even = (VecUL)_mm_mul_epu32((__m128i)a, (__m128i)factor);
  const VecUL odd = (VecUL)_mm_mul_epu32((__m128i)((VecUL)a >> 32), (__m128i)factor);
#endif
  high = (VecU)((even >> 32) | (odd & 0xffffffff00000000u));
  low = (VecU)((even & 0xffffffffu) | (odd << 32));
#else
  for (int i = 0; i < kLanesF; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Replaces the four words of each lane's counter by random ones.
FASTLM_INLINE void philox(VecU (&word)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU high0, low0, high1, low1;
    multiply_wide(word[0], kPhiloxMultiplier[0], high0, low0);
    multiply_wide(word[2], kPhiloxMultiplier[1], high1, low1);
    word[0] = high1 ^ word[1] ^ k0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ k1;
    word[3] = low0;
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
}

// As the scalar function of this name.
FASTLM_INLINE VecF open_unit(VecU word) { return __builtin_convertvector((VecI)(2 * (word >> 9) + 1), VecF) * 0x1p-24f; }

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
