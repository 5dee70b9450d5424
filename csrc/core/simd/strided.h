// Values that lie in twos or threes in memory, taken apart into vectors and put together again: shuffles where a compiler goes
// element by element. Included after simd.h.
#pragma once

#include <utility>

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// 16-bit values, twice as many as a VecH has.
typedef uint16_t VecH2 __attribute__((vector_size(kVectorBytes)));

template <int... kLane>
FASTLM_INLINE void split_twos(const VecI (&v)[2], VecI& first, VecI& second, std::integer_sequence<int, kLane...>) {
  first = __builtin_shufflevector(v[0], v[1], (2 * kLane)...);
  second = __builtin_shufflevector(v[0], v[1], (2 * kLane + 1)...);
}
// Elements 0, 2, 4, ... and 1, 3, 5, ... of two vectors one after the other.
FASTLM_INLINE void split_twos(const VecI (&v)[2], VecI& first, VecI& second) {
  split_twos(v, first, second, std::make_integer_sequence<int, kLanesF>{});
}

template <int... kLane>
FASTLM_INLINE void load_threes(const bfloat16* from, VecH (&to)[3], std::integer_sequence<int, kLane...>) {
  VecH2 low, high = {};
  __builtin_memcpy(&low, from, sizeof(low));
  __builtin_memcpy(&high, from + 2 * kLanesF, sizeof(high) / 2);
  to[0] = __builtin_shufflevector(low, high, (3 * kLane)...);
  to[1] = __builtin_shufflevector(low, high, (3 * kLane + 1)...);
  to[2] = __builtin_shufflevector(low, high, (3 * kLane + 2)...);
}
// Elements 0, 3, 6, ...; 1, 4, 7, ...; and 2, 5, 8, ... of 3 * kLanesF values.
FASTLM_INLINE void load_threes(const bfloat16* from, VecH (&to)[3]) {
  load_threes(from, to, std::make_integer_sequence<int, kLanesF>{});
}

FASTLM_INLINE VecH2 doubled(VecH h) {
  VecH2 v = {};
  __builtin_memcpy(&v, &h, sizeof(h));
  return v;
}

template <int... kLane, int... kHalf>
FASTLM_INLINE void store_threes(bfloat16* to, VecH a, VecH b, VecH c, std::integer_sequence<int, kLane...>,
                                std::integer_sequence<int, kHalf...>) {
  constexpr int kL = kLanesF;
  // The first two of every three, then the third: a shuffle takes from two vectors.
  const VecH2 ab = __builtin_shufflevector(doubled(a), doubled(b), (kHalf % 3 == 1 ? 2 * kL + kHalf / 3 : kHalf / 3)...);
  const VecH2 low = __builtin_shufflevector(ab, doubled(c), (kHalf % 3 == 2 ? 2 * kL + kHalf / 3 : kHalf)...);
  const VecH ab_end =
      __builtin_shufflevector(a, b, ((kLane + 2 * kL) % 3 == 1 ? kL + (kLane + 2 * kL) / 3 : (kLane + 2 * kL) / 3)...);
  const VecH high = __builtin_shufflevector(ab_end, c, ((kLane + 2 * kL) % 3 == 2 ? kL + (kLane + 2 * kL) / 3 : kLane)...);
  __builtin_memcpy(to, &low, sizeof(low));
  __builtin_memcpy(to + 2 * kL, &high, sizeof(high));
}
// The way back.
FASTLM_INLINE void store_threes(bfloat16* to, VecH a, VecH b, VecH c) {
  store_threes(to, a, b, c, std::make_integer_sequence<int, kLanesF>{}, std::make_integer_sequence<int, 2 * kLanesF>{});
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
