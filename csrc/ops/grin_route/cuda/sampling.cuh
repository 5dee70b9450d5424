// Uniform numbers of a lane's experts (places: ../params.h) and the Gumbel transform, with the logarithm of ../cpu/sampling.h:
// plain sums, products and quotients that no compiler fuses, so that the CPU and the GPU pick the same experts.
#pragma once

#include "core/cuda/device.cuh"
#include "core/philox.h"
#include "ops/grin_route/cuda/forms.h"
#include "ops/grin_route/cuda/launch.h"

namespace fastlm::grin_route::cuda {

// ln x for positive normal x.
__device__ __forceinline__ float log_unfused(float x) {
  const int32_t bits = __float_as_int(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float m = __int_as_float(bits - (e << 23));  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const float f = __fadd_rn(m, -1.0f);
  const float s = __fdiv_rn(f, __fadd_rn(2.0f, f));
  const float z = __fmul_rn(s, s);
  float p = __fadd_rn(__fmul_rn(0.24279078841f, z), 0.28498786688f);
  p = __fadd_rn(__fmul_rn(p, z), 0.40000972152f);
  p = __fadd_rn(__fmul_rn(p, z), 0.66666662693f);
  const auto ef = static_cast<float>(e);
  const float h = __fmul_rn(__fmul_rn(f, f), 0.5f);
  const float y = __fadd_rn(__fmul_rn(s, __fadd_rn(h, __fmul_rn(z, p))), __fmul_rn(ef, 9.0580006145e-6f));
  return __fadd_rn(__fmul_rn(ef, 0.69313812256f), __fadd_rn(__fadd_rn(y, -h), f));
}
__device__ __forceinline__ double log_unfused(double x) { return log(x); }

// A Gumbel variable from a uniform one. Numbers outside (0, 1) and NaN are moved to its nearest end: nothing is infinite.
template <class A>
__device__ __forceinline__ A gumbel(A u) {
  constexpr A kLow = sizeof(A) == 8 ? A(0x1p-1022) : A(0x1p-126);
  constexpr A kHigh = sizeof(A) == 8 ? A(1 - 0x1p-53) : A(1 - 0x1p-24);
  u = u > kLow ? u : kLow;
  u = u < kHigh ? u : kHigh;
  return -log_unfused(-log_unfused(u));
}

template <class A>
struct Sampler {
  const ForwardCall& call;
  uint64_t seed;
  int64_t token;
  int pick;

  // Draws of the experts from `first`, a multiple of 4; where noise is given, only those named by `wanted`.
  __device__ __forceinline__ void quad(int first, uint32_t wanted, A (&u)[kQuad]) const {
    if (call.noise == nullptr) {
      const Philox4 words = generate(first);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) u[i] = open_unit(words.word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) u[i] = wanted >> i & 1u ? given(first + i) : A(0);
    }
  }
  __device__ __forceinline__ A one(int draw) const {
    if (call.noise != nullptr) return given(draw);
    const Philox4 words = generate(draw);
    const uint32_t low = draw & 1 ? words.word[1] : words.word[0];
    const uint32_t high = draw & 1 ? words.word[3] : words.word[2];
    return open_unit(draw & 2 ? high : low);
  }

 private:
  __device__ __forceinline__ Philox4 generate(int draw) const {
    return philox(Philox4{{static_cast<uint32_t>(token), static_cast<uint32_t>(pick), static_cast<uint32_t>(draw / kQuad), 0}},
                  seed);
  }
  __device__ __forceinline__ A given(int draw) const {
    return fastlm::cuda::load_param<A>(
        call.noise, call.noise_dtype,
        token * call.noise_token_stride + pick * call.noise_pick_stride + draw * call.noise_draw_stride);
  }
};

}  // namespace fastlm::grin_route::cuda
