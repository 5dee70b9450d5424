// Packs matrices for packed_gemm.h (the layouts are described there): 16-bit values become floats, or pairs of bf16 where the CPU
// multiplies those. Takes any strides. Per-level code.
#pragma once

#include "core/simd/packed_gemm.h"
#include "core/simd/transpose.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Rows of a matrix, counted from the first one of interest; beyond their end there is nothing.
template <class T>
struct Rows {
  const T* first;
  const int64_t* index;  // null: consecutive
  int64_t row_stride, col_stride;
  int64_t count, columns;

  FASTLM_INLINE const T* row(int64_t r) const {
    if (r >= count) return nullptr;
    return first + (index == nullptr ? r : index[r]) * row_stride;
  }
};

// A vector of elements from column c of a row (null: zeros); zeros beyond the last column.
template <class T>
FASTLM_INLINE vec_t<T> read(const Rows<T>& from, const T* row, int64_t c) {
  const int64_t n = from.columns - c;
  if (row == nullptr || n <= 0) return zero<vec_t<T>>();
  if (from.col_stride == 1) return load_upto(row + c, n);
  acc_t<T> lane[lanes_of<T>] = {};
  for (int64_t i = 0; i < n && i < lanes_of<T>; ++i) lane[i] = to_acc(row[(c + i) * from.col_stride]);
  return load(lane);
}

// A vector of operands from operand k of a row.
template <class T, class E>
FASTLM_INLINE operand_vec<E> read_operands(const Rows<T>& from, const T* row, int64_t k) {
  if constexpr (depth_per_operand<E> == 1) {
    return read(from, row, k);
  } else {
    constexpr int64_t kValues = 2 * kLanesF;
    const int64_t n = row == nullptr ? 0 : from.columns - 2 * k;
    T lane[kValues] = {};
    if (from.col_stride == 1 && n >= kValues) {
      __builtin_memcpy(lane, row + 2 * k, sizeof(lane));
    } else {
      for (int64_t i = 0; i < n && i < kValues; ++i) lane[i] = row[(2 * k + i) * from.col_stride];
    }
    operand_vec<E> v;
    __builtin_memcpy(&v, lane, sizeof(v));
    return v;
  }
}

template <class E, class V>
FASTLM_INLINE void store_operands(E* to, V v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Rows of A: (k / N, capacity, N).
template <class T, class E>
void pack_rows(const Rows<T>& from, int64_t capacity, E* out, int64_t begin, int64_t end) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t depth = operand_depth<E>(from.columns);
  for (int64_t r = begin; r < end; ++r) {
    const T* row = from.row(r);
    for (int64_t run = 0; run * kN < depth; ++run) {
      E* to = out + (run * capacity + r) * kN;
      for (int64_t i = 0; i < kN; i += kOperandLanes<E>) {
        store_operands(to + i, read_operands<T, E>(from, row, run * kN + i));
      }
    }
  }
}

// Columns of B that are the matrix's columns, its rows being k: (columns / N, capacity in operands, N).
template <class T, class E>
void pack_depths(const Rows<T>& from, int64_t capacity, E* out, int64_t begin, int64_t end) {
  if constexpr (depth_per_operand<E> == 1) {
    pack_rows<T, E>(from, capacity, out, begin, end);
  } else {
    constexpr int64_t kN = kPackedColumns<E>;
    for (int64_t r = begin; r < end; r += 2) {
      const T* low = from.row(r);
      const T* high = from.row(r + 1);
      for (int64_t c = 0; c < ceil_div(from.columns, kN) * kN; c += kLanesF) {
        const VecI low_bits = ((VecI)read(from, low, c) >> 16) & 0xffff;
        store_operands(out + ((c / kN) * (capacity / 2) + r / 2) * kN + c % kN, low_bits | (VecI)read(from, high, c));
      }
    }
  }
}

// Columns of B that are the matrix's rows: (rows / N, k, N).
template <class T, class E>
void pack_columns(const Rows<T>& from, E* out, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = kOperandLanes<E>;
  constexpr int64_t kN = kPackedColumns<E>;
  using V = vec_t<operand_acc<E>>;  // bits are moved, not read: pairs may pose as floats
  const int64_t depth = operand_depth<E>(from.columns);
  for (int64_t r = begin; r < end; r += kLanes) {
    E* panel = out + r / kN * kN * depth + r % kN;
    for (int64_t k = 0; k < depth; k += kLanes) {
      V square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) square[i] = (V)read_operands<T, E>(from, from.row(r + i), k);
      transpose(square);
      for (int64_t i = 0; i < min_of(kLanes, depth - k); ++i) store_operands(panel + (k + i) * kN, square[i]);
    }
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
