// A few rows of a matrix times one or two vectors, straight from memory: what is left of a matrix product when memory bounds it.
// Vectors run along the rows. An element is summed in the same order whatever rows and tokens are computed beside it. Per-level
// code.
#pragma once

#include "core/simd/lane_sums.h"
#include "core/simd/operand.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Rows of W that are worked on together: as many vectors as one tree of sums takes. Tokens: so many that the sums fit the
// registers.
constexpr int kDotRows = 8, kDotTokens = 2;

// A vector as it is multiplied: of the accumulation type, or of pairs of bf16 where the CPU has their dot product.
template <class T>
using dot_vec = operand_vec<operand_t<T>>;
template <class T>
FASTLM_INLINE dot_vec<T> load_dot(const T* p) {
  if constexpr (depth_per_operand<operand_t<T>> == 2) {
    dot_vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  } else {
    return load(p);
  }
}

// Rows `rows[0 .. kDotRows)` of W, `stride` apart, times `kCount` tokens, `n` elements each. The rows behind them, which come
// next, are fetched meanwhile: each begins on another page, where a hardware prefetcher would have to find its way anew.
template <class T, int kCount>
FASTLM_INLINE void dots(const T* const (&rows)[kDotRows], int64_t stride, const T* const (&x)[kDotTokens], int64_t n,
                        acc_t<T> (&sums)[kDotTokens][kDotRows]) {
  using V = vec_t<T>;
  constexpr int64_t kStep = lanes_of<T> * depth_per_operand<operand_t<T>>;  // values of one vector
  V sum[kCount][kDotRows] = {};
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    dot_vec<T> token[kCount];
#pragma GCC unroll 2
    for (int t = 0; t < kCount; ++t) token[t] = load_dot(x[t] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) {
      __builtin_prefetch(rows[r] + kDotRows * stride + k, 0, 3);
      const dot_vec<T> w = load_dot(rows[r] + k);
#pragma GCC unroll 2
      for (int t = 0; t < kCount; ++t) sum[t][r] = multiply_add(w, token[t], sum[t][r]);
    }
  }
  if (k < n) {
    const auto rest = [&](const T* from) {
      T lane[kStep] = {};
      __builtin_memcpy(lane, from + k, sizeof(T) * static_cast<size_t>(n - k));
      return load_dot(lane);
    };
    for (int r = 0; r < kDotRows; ++r) {
      const dot_vec<T> w = rest(rows[r]);
      for (int t = 0; t < kCount; ++t) sum[t][r] = multiply_add(w, rest(x[t]), sum[t][r]);
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int r = 0; r < kDotRows; ++r) sums[t][r] = acc_t<T>(0);
    add_lane_sums(sum[t], sums[t]);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
