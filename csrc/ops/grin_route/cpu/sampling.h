// Uniform numbers of a block of tokens, one per lane (places: params.h), and the Gumbel transform. Per-level code.
//
// The logarithm here is made of plain products, sums and quotients, which round alike everywhere: with a fused multiply-add, two
// CPU levels could pick different experts. float64 takes libm's.
#pragma once

#include "core/simd/philox.h"
#include "ops/grin_route/cpu/block.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// ln x for positive normal x; error below 2 units in the last place. As log of core/simd/math.h.
FASTLM_INLINE VecF log_unfused(VecF x) {
  const VecI bits = (VecI)x;
  const VecI e = (bits - 0x3f3504f3) >> 23;
  const VecF m = (VecF)(bits - (e << 23));  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const VecF f = m - 1.0f;
  const VecF s = f / (2.0f + f);
  const VecF z = s * s;
  const VecF p = ((0.24279078841f * z + 0.28498786688f) * z + 0.40000972152f) * z + 0.66666662693f;
  const VecF ef = __builtin_convertvector(e, VecF);
  const VecF h = f * f * 0.5f;
  const VecF y = s * (h + z * p) + ef * 9.0580006145e-6f;
  return ef * 0.69313812256f + ((y - h) + f);
}
FASTLM_INLINE VecD log_unfused(VecD x) { return log(x); }

// A Gumbel variable from a uniform one. Numbers outside (0, 1) and NaN are moved to its nearest end: nothing is infinite.
template <class V>
FASTLM_INLINE V gumbel(V u) {
  constexpr bool kDouble = sizeof(V{}[0]) == 8;
  const V low = broadcast<V>(kDouble ? 0x1p-1022 : 0x1p-126);
  const V high = broadcast<V>(kDouble ? 1 - 0x1p-53 : 1 - 0x1p-24);
  u = u > low ? u : low;
  u = u < high ? u : high;
  return -log_unfused(-log_unfused(u));
}

template <class A>
struct Sampler {
  using V = typename Lane<A>::V;
  using I = typename Lane<A>::I;
  static constexpr int64_t kLanes = Lane<A>::kCount;

  const grin_route::ForwardParams& p;
  int64_t token, count, pick;
  int64_t block = -1;  // of the four numbers in `ready`
  V ready[4] = {};

  // Draw `draw` of every token.
  FASTLM_INLINE V number(int64_t draw) {
    if (p.noise != nullptr) return given(broadcast_index<A>(draw));
    if (draw / 4 != block) {
      block = draw / 4;
      generate(broadcast_index<A>(block), ready);
    }
    return ready[draw % 4];
  }

  // A draw of its own for each token.
  FASTLM_INLINE V number(I draw) {
    if (p.noise != nullptr) return given(draw);
    V four[4];
    generate(draw >> 2, four);
    const I word = draw & 3;
    return word == 0 ? four[0] : word == 1 ? four[1] : word == 2 ? four[2] : four[3];
  }

 private:
  FASTLM_INLINE V given(I draw) const {
    A lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      lane[i] = load_param<A>(p.noise, p.noise_dtype,
                              (token + i) * p.noise_token_stride + pick * p.noise_pick_stride + draw[i] * p.noise_draw_stride);
    }
    return load(lane);
  }

  // Lanes beyond `count` get numbers, too; they are not used.
  FASTLM_INLINE void generate(I draws, V (&to)[4]) const {
    if constexpr (sizeof(A) == 4) {
      uint32_t tokens[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) tokens[i] = static_cast<uint32_t>(token + i);
      VecU word[4];
      __builtin_memcpy(&word[0], tokens, sizeof(tokens));
      word[1] = broadcast_word(static_cast<uint32_t>(pick));
      word[2] = (VecU)draws;
      word[3] = broadcast_word(0);
      philox(word, p.seed);
      for (int i = 0; i < 4; ++i) to[i] = open_unit(word[i]);
    } else {
      for (int64_t i = 0; i < kLanes; ++i) {
        const Philox4 words = ::fastlm::philox(
            Philox4{{static_cast<uint32_t>(token + i), static_cast<uint32_t>(pick), static_cast<uint32_t>(draws[i]), 0}}, p.seed);
        for (int j = 0; j < 4; ++j) to[j][i] = ::fastlm::open_unit(words.word[j]);
      }
    }
  }
};

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
