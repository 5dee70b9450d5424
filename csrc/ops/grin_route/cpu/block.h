// A block of tokens in registers: one token per lane, one vector per expert, so that masks, quotients and softmax are element by
// element and no expert count is special. What both passes share: loading, the largest remaining logit, the mask. Per-level code.
//
// Experts are ranked by an integer that orders floats as torch.max does: NaN above everything, -0 equal to +0. Experts already
// picked get the smallest integer, which even -inf is above: another one is always found.
#pragma once

#include "core/scratch.h"
#include "core/simd/simd.h"
#include "core/simd/transpose.h"
#include "ops/grin_route/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

template <class A>
struct Lane {
  using V = typename VectorOf<A>::type;
  using I = typename VectorOf<A>::mask;
  using Int = decltype(I{}[0] + 0);
  static constexpr int64_t kCount = VectorOf<A>::lanes;
  static constexpr int kSignBit = 8 * sizeof(Int) - 1;
  static constexpr Int kPicked = Int(1) << (kSignBit - 1) << 1;
  static constexpr Int kNan = ~kPicked;  // above the rank of infinity, and NaN when turned back
};

FASTLM_INLINE bool any(VecI mask) {
#if defined(__AVX512F__) && defined(FASTLM_SIMD_512) && !defined(FASTLM_EMULATE_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(FASTLM_SIMD_256)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  uint64_t word[sizeof(mask) / 8], all = 0;
  __builtin_memcpy(word, &mask, sizeof(mask));
  for (const uint64_t w : word) all |= w;
  return all != 0;
#endif
}
FASTLM_INLINE bool any(VecL mask) { return any((VecI)mask); }

template <class A>
FASTLM_INLINE typename Lane<A>::I broadcast_index(int64_t i) {
  return static_cast<typename Lane<A>::Int>(i) + typename Lane<A>::I{};
}

template <class A>
FASTLM_INLINE typename Lane<A>::I rank_of(typename Lane<A>::V v) {
  using L = Lane<A>;
  const typename L::I bits = (typename L::I)(v + typename L::V{});  // -0 becomes +0
  const typename L::I rank = bits ^ ((bits >> L::kSignBit) & L::kNan);
  return v == v ? rank : broadcast_index<A>(L::kNan);
}
template <class A>
FASTLM_INLINE typename Lane<A>::V logit_of(typename Lane<A>::I rank) {
  using L = Lane<A>;
  return (typename L::V)(rank ^ ((rank >> L::kSignBit) & L::kNan));
}

template <class A>
FASTLM_INLINE typename Lane<A>::V absolute(typename Lane<A>::V v) {
  return (typename Lane<A>::V)((typename Lane<A>::I)v & Lane<A>::kNan);
}

template <class A>
struct Block {
  using V = typename Lane<A>::V;
  using I = typename Lane<A>::I;
  V* logits;  // (E rounded up to lanes)
  I* ranks;   // (E)

  FASTLM_INLINE void mark_picked(int64_t expert, int64_t lane) {
    reinterpret_cast<typename Lane<A>::Int*>(ranks + expert)[lane] = Lane<A>::kPicked;
  }
};

FASTLM_INLINE int64_t padded(int64_t experts, int64_t lanes) { return ceil_div(experts, lanes) * lanes; }

// Logits of `count` tokens from `token`; zeros in the lanes beyond.
template <class T>
void load_block(const grin_route::Params& p, int64_t token, int64_t count, Block<acc_t<T>>& block) {
  using A = acc_t<T>;
  using V = typename Lane<A>::V;
  constexpr int64_t kLanes = Lane<A>::kCount;
  const T* from = static_cast<const T*>(p.logits) + token * p.logits_token_stride;
  const int64_t experts = p.num_experts;
  if (p.logits_expert_stride == 1) {
    for (int64_t e = 0; e < experts; e += kLanes) {
      V square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = i < count ? load_upto(from + i * p.logits_token_stride + e, experts - e) : zero<V>();
      }
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) block.logits[e + i] = square[i];
    }
  } else {
    for (int64_t e = 0; e < experts; ++e) {
      A lane[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) lane[i] = to_acc(from[i * p.logits_token_stride + e * p.logits_expert_stride]);
      block.logits[e] = load(lane);
    }
  }
  for (int64_t e = 0; e < experts; ++e) block.ranks[e] = rank_of<A>(block.logits[e]);
}

// The largest remaining logit of each token; the first of several. z - top is 0 for it, or NaN if it is not finite.
template <class A>
struct Top {
  typename Lane<A>::I index;
  typename Lane<A>::V logit;
  typename Lane<A>::V unit;  // e^(z - top) of the largest itself: 1, or NaN

  FASTLM_INLINE Top(const Block<A>& block, int64_t experts) {
    using I = typename Lane<A>::I;
    I best = block.ranks[0];
    index = I{};
    for (int64_t e = 1; e < experts; ++e) {
      const I rank = block.ranks[e];
      const I better = rank > best;
      best = better ? rank : best;
      index = better ? broadcast_index<A>(e) : index;
    }
    logit = logit_of<A>(best);
    unit = (logit - logit) + A(1);
  }
};

// Where expert e survives the mask beside the largest. Written so that NaN keeps: 0 / 0 where all are 0, inf / inf.
template <class A>
FASTLM_INLINE typename Lane<A>::I survives(const Block<A>& block, const Top<A>& top, A threshold, int64_t e) {
  using V = typename Lane<A>::V;
  const V z = block.logits[e];
  const V quotient = (top.logit - z) / max(absolute<A>(z), top.logit);
  return ~(quotient > threshold) & (block.ranks[e] != Lane<A>::kPicked) & (top.index != broadcast_index<A>(e));
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
