// What a backend hands to an epilogue: slabs of 16 rows of sums, spread over a warp as wgmma and mma.sync leave them. Lane 4 g +
// c holds, for i, k in {0, 1}, d[4 j + 2 i + k] = sum of row 8 i + g and column 8 j + 2 c + k of the slab. With two parts the
// first half of the j belongs to part 0, the second to the same columns of part 1.
//
// An epilogue is a plain struct, copied into the kernel's arguments, with
//     static constexpr int kParts                                   1 or 2
//     template <int kCount, class A>
//     __device__ void operator()(const Slab& slab, A (&d)[kCount]) const
// called by all lanes of a warp for every slab with at least one row and column in range; which sums are in range is for it to
// ask. Slabs of one tile come in any order, from any warp.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/gemm/problem.h"

namespace fastlm::cuda::gemm {

struct Slab {
  int64_t group;
  int64_t row, row_end;     // first row; end of the group's rows (row product), m (outer product)
  int64_t column, columns;  // first column (of a part); n
  int lane;

  __device__ __forceinline__ int64_t row_of(int i) const { return row + 8 * i + lane / 4; }
  __device__ __forceinline__ int64_t column_of(int j) const { return column + 8 * j + lane % 4 * 2; }
};

// Sums over the four lanes that share rows; all of them get it.
template <class A>
__device__ __forceinline__ A quad_sum(A x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
template <class A>
__device__ __forceinline__ A quad_max(A x) {
  A other = __shfl_xor_sync(kFullWarp, x, 1);
  x = x > other ? x : other;
  other = __shfl_xor_sync(kFullWarp, x, 2);
  return x > other ? x : other;
}

// f(row, column, 4 j + 2 i + k) for the sums of a lane that are in range.
template <int kCount, class F>
__device__ __forceinline__ void each_sum(const Slab& slab, F&& f) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = slab.row_of(i);
    if (row >= slab.row_end) continue;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (const int64_t column = slab.column_of(j) + k; column < slab.columns) f(row, column, 4 * j + 2 * i + k);
      }
    }
  }
}

// Adds value[column] to the sums of each column in range.
template <int kCount, class A>
__device__ __forceinline__ void add_to_columns(const Slab& slab, const A* value, A (&d)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t column = slab.column_of(j) + k;
      const A x = column < slab.columns ? value[column] : A(0);
      d[4 * j + k] += x;
      d[4 * j + 2 + k] += x;
    }
  }
}

// A matrix that slabs are written to, or a stack of one for each group.
struct Output {
  void* data;
  int64_t row_stride, group_stride;  // elements
};

// Columns 8 j + 2 c + k of kGroups x 32 columns of one row, as pairs of 16-bit elements by j: exchanged among the quad so that
// lane c holds the eight elements from column 32 q + 8 c on, in word[4 q ..].
template <int kWords>
__device__ __forceinline__ void gather_pieces(uint32_t (&word)[kWords], int lane) {
  static_assert(kWords % 4 == 0);
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int q = 0; q < kWords; q += 4) {
    // A 4 x 4 transposition over the quad: lanes are columns, words are rows.
    const uint32_t a = __shfl_xor_sync(kFullWarp, odd ? word[q] : word[q + 1], 1);
    const uint32_t b = __shfl_xor_sync(kFullWarp, odd ? word[q + 2] : word[q + 3], 1);
    const uint32_t first[4] = {odd ? a : word[q], odd ? word[q + 1] : a, odd ? b : word[q + 2], odd ? word[q + 3] : b};
    const uint32_t c = __shfl_xor_sync(kFullWarp, high ? first[0] : first[2], 2);
    const uint32_t d = __shfl_xor_sync(kFullWarp, high ? first[1] : first[3], 2);
    word[q] = high ? c : first[0];
    word[q + 1] = high ? d : first[1];
    word[q + 2] = high ? first[2] : c;
    word[q + 3] = high ? first[3] : d;
  }
}

// Writes sums first .. first + kCount of d as elements of type T to rows of `to`, from slab.column on; d[4 j + 2 i + k] as above
// with j from 0. 16-bit elements go out as 16 bytes a lane where the rows are aligned.
template <class T, int kCount, class A>
__device__ __forceinline__ void store_slab(const Slab& slab, const Output& to, const A* d) {
  T* const base = static_cast<T*>(to.data) + slab.group * to.group_stride;
  if constexpr (sizeof(T) == 2 && kCount % 16 == 0) {
    constexpr int kColumns = 2 * kCount;
    const bool wide = slab.column + kColumns <= slab.columns && to.row_stride % 8 == 0 && to.group_stride % 8 == 0 &&
                      slab.column % 8 == 0 && reinterpret_cast<uintptr_t>(to.data) % 16 == 0;
    if (wide) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t word[kCount / 4];
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) word[j] = pack_pair<T>(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
        gather_pieces(word, slab.lane);
        const int64_t row = slab.row_of(i);
        if (row >= slab.row_end) continue;
        T* const line = base + row * to.row_stride + slab.column + slab.lane % 4 * 8;
#pragma unroll
        for (int q = 0; q < kCount / 16; ++q) store_words<16>(line + 32 * q, word + 4 * q);
      }
      return;
    }
  }
  each_sum<kCount>(slab, [&](int64_t row, int64_t column, int v) { base[row * to.row_stride + column] = from_acc<T>(d[v]); });
}

// out = sums, or out + sums in the accumulation type.
template <class T>
struct Store {
  static constexpr int kParts = 1;
  Output out;

  template <int kCount, class A>
  __device__ __forceinline__ void operator()(const Slab& slab, A (&d)[kCount]) const {
    store_slab<T, kCount>(slab, out, d);
  }
};

template <class A>
struct Accumulate {
  static constexpr int kParts = 1;
  Output out;  // of A

  template <int kCount>
  __device__ __forceinline__ void operator()(const Slab& slab, A (&d)[kCount]) const {
    A* const base = static_cast<A*>(out.data) + slab.group * out.group_stride;
    each_sum<kCount>(slab, [&](int64_t row, int64_t column, int v) { base[row * out.row_stride + column] += d[v]; });
  }
};

}  // namespace fastlm::cuda::gemm
