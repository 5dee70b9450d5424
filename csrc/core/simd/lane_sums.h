// Sums over the lanes of eight vectors at once: a tree in which every shuffle serves two vectors, 14 shuffles in all where eight
// single reductions take more than twice as many. The order of the sums is fixed by the vector length. Included after simd.h.
#pragma once

#include <utility>

#include "core/simd/simd.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Within each four lanes: (a0 + a2, b0 + b2, a1 + a3, b1 + b3).
template <int... kLane>
FASTLM_INLINE VecF add_pairs(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  const VecF low = __builtin_shufflevector(a, b, (kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kLanesF)...);
  const VecF high = __builtin_shufflevector(a, b, (kLane / 4 * 4 + kLane % 4 / 2 + 2 + kLane % 2 * kLanesF)...);
  return low + high;
}

// From two results of add_pairs, within each four lanes: the sums of a, b, c and d.
template <int... kLane>
FASTLM_INLINE VecF add_quads(VecF ab, VecF cd, std::integer_sequence<int, kLane...>) {
  const VecF low = __builtin_shufflevector(ab, cd, (kLane / 4 * 4 + kLane % 2 + kLane % 4 / 2 * kLanesF)...);
  const VecF high = __builtin_shufflevector(ab, cd, (kLane / 4 * 4 + kLane % 2 + 2 + kLane % 4 / 2 * kLanesF)...);
  return low + high;
}

#if defined(FASTLM_SIMD_512) || defined(FASTLM_SIMD_256)
// Neighbouring fours are added: those of x fill the lower half of the result, those of y the upper.
template <int... kLane>
FASTLM_INLINE VecF add_fours(VecF x, VecF y, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, y, (kLane / 4 * 8 + kLane % 4)...) +
         __builtin_shufflevector(x, y, (kLane / 4 * 8 + 4 + kLane % 4)...);
}
#endif

// to[i] += sum over the lanes of v[i].
FASTLM_INLINE void add_lane_sums(const VecF (&v)[8], float* to) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanesF>{};
  VecF half[2];
  for (int i = 0; i < 2; ++i) {
    half[i] = add_quads(add_pairs(v[4 * i], v[4 * i + 1], kAll), add_pairs(v[4 * i + 2], v[4 * i + 3], kAll), kAll);
  }
#if defined(FASTLM_SIMD_512)
  typedef float Eight __attribute__((vector_size(32)));
  const VecF fours = add_fours(half[0], half[1], kAll);
  Eight sum;
  __builtin_memcpy(&sum, to, sizeof(sum));
  sum += __builtin_shufflevector(fours, fours, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours, fours, 4, 5, 6, 7, 12, 13, 14, 15);
  __builtin_memcpy(to, &sum, sizeof(sum));
#elif defined(FASTLM_SIMD_256)
  store(to, load(to) + add_fours(half[0], half[1], kAll));
#else
  for (int i = 0; i < 2; ++i) store(to + 4 * i, load(to + 4 * i) + half[i]);
#endif
}
FASTLM_INLINE void add_lane_sums(const VecD (&v)[8], double* to) {
  for (int i = 0; i < 8; ++i) to[i] += reduce_add(v[i]);
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
