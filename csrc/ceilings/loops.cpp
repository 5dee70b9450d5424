// The measuring loops of one CPU level. Every loop keeps enough independent chains in flight to hide the latency of its
// instruction: two pipes of four cycles need eight chains, ten leave room for a third reader of the registers.
#include "ceilings/kernels.h"
#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

constexpr int kChains = 10;

// Tells the compiler that a register may have changed or was read, without an instruction.
#if defined(FASTLM_EMULATE_AVX512)
#define FASTLM_OPAQUE(v) __asm__ volatile("" : "+m"(v))  // a vector of 64 bytes fits no register
#elif defined(__AVX512F__)
#define FASTLM_OPAQUE(v) __asm__ volatile("" : "+v"(v))
#elif defined(__x86_64__)
#define FASTLM_OPAQUE(v) __asm__ volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define FASTLM_OPAQUE(v) __asm__ volatile("" : "+w"(v))
#else
#define FASTLM_OPAQUE(v) __asm__ volatile("" : "+m"(v))
#endif

double fma_loop(int64_t rounds, float* sink) {
  VecF chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast<VecF>(0.5f + 0.01f * static_cast<float>(i));
  VecF factor = broadcast<VecF>(0.999f), term = broadcast<VecF>(0.001f);
  FASTLM_OPAQUE(factor);
  FASTLM_OPAQUE(term);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], factor, term);
  }
  VecF sum = zero<VecF>();
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  *sink = reduce_add(sum);
  return 2.0 * kChains * kLanesF * static_cast<double>(rounds);
}

double exp2_loop(int64_t rounds, float* sink) {
  constexpr int kValues = 4;
  VecF x = broadcast<VecF>(-1.25f), y = zero<VecF>();
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kValues; ++i) {
      FASTLM_OPAQUE(x);
      y = exp2_fast(x);
      FASTLM_OPAQUE(y);
    }
  }
  *sink = reduce_add(y);
  return static_cast<double>(kValues) * kLanesF * static_cast<double>(rounds);
}

#if defined(__AVX512BF16__) && defined(FASTLM_SIMD_512)
double dot_bf16_loop(int64_t rounds, float* sink) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_setzero_ps();
  __m512i bits = _mm512_set1_epi16(0x3c00);  // 2^-7
  FASTLM_OPAQUE(bits);
  const __m512bh pairs = (__m512bh)bits;
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], pairs, pairs);
  }
  VecF sum = zero<VecF>();
  for (int i = 0; i < kChains; ++i) sum += (VecF)chain[i];
  *sink = reduce_add(sum);
  return 4.0 * kChains * kLanesF * static_cast<double>(rounds);  // two products and two sums per fp32 lane
}
constexpr ceilings::RegisterLoop kDotBf16 = dot_bf16_loop;
#else
constexpr ceilings::RegisterLoop kDotBf16 = nullptr;
#endif

double read_loop(const float* from, int64_t count, float* sink) {
  constexpr int kStreams = 8;
  VecF sum[kStreams] = {};
  for (int64_t i = 0; i < count; i += kStreams * kLanesF) {
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) sum[j] += load(from + i + j * kLanesF);
  }
  for (int j = 1; j < kStreams; ++j) sum[0] += sum[j];
  *sink = reduce_add(sum[0]);
  return static_cast<double>(count) * sizeof(float);
}

double copy_loop(float* to, const float* from, int64_t count) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < count; i += kLanesF) {
#if defined(FASTLM_SIMD_512) && defined(__AVX512F__)
    _mm512_stream_ps(to + i, (__m512)load(from + i));
#elif defined(FASTLM_SIMD_256)
    _mm256_stream_ps(to + i, (__m256)load(from + i));
#else
    _mm_stream_ps(to + i, (__m128)load(from + i));
#endif
  }
  _mm_sfence();
#else
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
#endif
  return 2.0 * static_cast<double>(count) * sizeof(float);
}

}  // namespace

extern const ceilings::Kernels ceiling_kernels;
const ceilings::Kernels ceiling_kernels = {fma_loop, exp2_loop, kDotBf16, read_loop, copy_loop};

}  // namespace fastlm::FASTLM_CPU_LEVEL
