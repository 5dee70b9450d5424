// Packing of matrices for gemm.h: conversion to operands, padding with zeros, transposition. Rows of the source have unit stride.
// `probe` collects 0 * value: it is NaN afterwards if any value was not finite.
#pragma once

#include "core/simd/gemm.h"
#include "core/simd/transpose.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

template <class V>
FASTLM_INLINE void probe_value(V& probe, V x) {
  probe = fma(x, zero<V>(), probe);
}
FASTLM_INLINE void probe_value(VecF& probe, VecI pairs) {
  probe_value(probe, (VecF)(pairs & broadcast_operand(Bf16Pair{0xffff0000u})));
  probe_value(probe, (VecF)(pairs << 16));
}
template <class V>
FASTLM_INLINE bool probe_found(V probe) {
  const auto bad = probe != probe;
  bool found = false;
  for (size_t i = 0; i < sizeof(V) / sizeof(probe[0]); ++i) found |= bad[i] != 0;
  return found;
}

// A vector of operands from `n` values (fewer than a vector: the rest is zero).
FASTLM_INLINE VecI load_pairs(const bfloat16* p, int64_t n) {
  VecI v = {};
  if (n >= 2 * kLanesF) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else if (n > 0) {
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * 2);
  }
  return v;
}
template <class E, class T>
FASTLM_INLINE operand_vec<E> load_source(const T* p, int64_t n) {
  if constexpr (depth_per_operand<E> == 2) {
    return load_pairs(p, n);
  } else {
    return n > 0 ? load_upto(p, n) : zero<vec_t<T>>();
  }
}
template <class E>
FASTLM_INLINE void store_operands(E* p, operand_vec<E> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// ---- along the depth: rows of A -------------------------------------------------------------------------------------

// `n` values become operands 0 .. padded, the rest zero; `padded` is a multiple of the vector length.
template <class E, class T>
FASTLM_INLINE void pack_row(const T* from, int64_t n, E* to, int64_t padded, vec_t<T>& probe) {
  constexpr int64_t kLanes = lanes_of<T>, kDepth = depth_per_operand<E>;
  int64_t d = 0;
  for (; (d + kLanes) * kDepth <= n; d += kLanes) {
    const operand_vec<E> v = load_source<E>(from + d * kDepth, kLanes * kDepth);
    probe_value(probe, v);
    store_operands(to + d, v);
  }
  for (; d < padded; d += kLanes) {
    const operand_vec<E> v = load_source<E>(from + d * kDepth, n - d * kDepth);
    probe_value(probe, v);
    store_operands(to + d, v);
  }
}

// ---- across the depth: rows of B ------------------------------------------------------------------------------------

// Rows [begin, end) of the source become the depths of a matrix with `padded` columns; depths are counted from 0, and a pair that
// reaches beyond [begin, end) is filled up with zeros.
template <class E, class T>
void pack_depths(const T* from, int64_t row_stride, int64_t begin, int64_t end, int64_t n, E* to, int64_t to_stride,
                 int64_t padded, vec_t<T>& probe) {
  constexpr int64_t kLanes = lanes_of<T>;
  if constexpr (depth_per_operand<E> == 2) {
    for (int64_t d = begin / 2; d < operand_depth<E>(end); ++d) {
      const T* first = from + 2 * d * row_stride;
      const bool has_first = 2 * d >= begin, has_second = 2 * d + 1 < end;
      for (int64_t c = 0; c < padded; c += kLanes) {
        VecH low = {}, high = {};
        const size_t bytes = static_cast<size_t>(n - c >= kLanes ? kLanes : max_of(n - c, 0)) * 2;
        if (has_first) __builtin_memcpy(&low, first + c, bytes);
        if (has_second) __builtin_memcpy(&high, first + row_stride + c, bytes);
        const VecI v = pair_halves(low, high);
        probe_value(probe, v);
        store_operands(to + d * to_stride + c, v);
      }
    }
  } else {
    for (int64_t d = begin; d < end; ++d) pack_row(from + d * row_stride, n, to + d * to_stride, padded, probe);
  }
}

// ---- sums that become operands again ---------------------------------------------------------------------------------

// One row of sums as pairs along the row. `n` is a multiple of two vectors.
FASTLM_INLINE void convert_row(const float* from, Bf16Pair* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanesF) store(reinterpret_cast<bfloat16*>(to) + c, load(from + c));
}

// 2 * `pairs` rows of sums as pairs of rows.
FASTLM_INLINE void convert_across(const float* from, int64_t from_stride, Bf16Pair* to, int64_t to_stride, int64_t pairs,
                                  int64_t n) {
  for (int64_t d = 0; d < pairs; ++d) {
    for (int64_t c = 0; c < n; c += kLanesF) {
      const VecH low = bf16_bits(load(from + 2 * d * from_stride + c));
      const VecH high = bf16_bits(load(from + (2 * d + 1) * from_stride + c));
      store_operands(to + d * to_stride + c, pair_halves(low, high));
    }
  }
}

// ---- transposed: columns of B ----------------------------------------------------------------------------------------

// Rows [begin, end) of the source (`n` values each) become columns of B: panels of kTileCols columns, (panel, depth, column).
// Columns are counted from 0; those of a touched panel outside [begin, end) are zero.
template <class E, class T>
void pack_columns(const T* from, int64_t row_stride, int64_t begin, int64_t end, int64_t n, E* to) {
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr int64_t kDepth = depth_per_operand<E>;
  const int64_t depth = operand_depth<E>(n);
  for (int64_t c = begin / kTileCols<E> * kTileCols<E>; c < end; c += kTileCols<E>) {
    E* panel = to + c * depth;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t c0 = c + half * kLanes;
      for (int64_t d = 0; d < depth; d += kLanes) {
        vec_t<operand_acc<E>> v[kLanes];  // bits are moved, not read: pairs may pose as floats
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          const bool inside = c0 + i >= begin && c0 + i < end;
          v[i] = inside ? (vec_t<operand_acc<E>>)load_source<E>(from + (c0 + i) * row_stride + d * kDepth, n - d * kDepth)
                        : zero<vec_t<operand_acc<E>>>();
        }
        transpose(v);
        const int64_t rows = min_of(kLanes, depth - d);
        for (int64_t i = 0; i < rows; ++i) {
          store_operands(panel + (d + i) * kTileCols<E> + half * kLanes, (operand_vec<E>)v[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
