// Turns a square of lanes x lanes values held in registers: row i, lane j <-> row j, lane i. log2(lanes) rounds of shuffles;
// round w swaps the blocks of w x w values that lie across the diagonal of blocks of 2w x 2w. Included after simd.h.
#pragma once

#include <utility>

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Lanes of `low` and `high` (numbered lanes..2*lanes-1), as the two rows of a swapped pair.
template <int kWidth, class V, int... kLane>
FASTLM_INLINE void swap_blocks(V& low, V& high, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, ((kLane & kWidth) != 0 ? kLanes + kLane - kWidth : kLane)...);
  high = __builtin_shufflevector(a, b, ((kLane & kWidth) != 0 ? kLanes + kLane : kLane + kWidth)...);
}

template <int kWidth, class V>
FASTLM_INLINE void transpose_round(V* rows) {
  constexpr int kLanes = sizeof(V) / sizeof(typename ScalarOf<V>::type);
  if constexpr (kWidth < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kWidth) == 0) swap_blocks<kWidth>(rows[i], rows[i | kWidth], std::make_integer_sequence<int, kLanes>{});
    }
    transpose_round<2 * kWidth>(rows);
  }
}

// In place; `rows` holds as many vectors as a vector has lanes.
template <class V>
FASTLM_INLINE void transpose(V* rows) {
  transpose_round<1>(rows);
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
