// The register tile under the matrix products of the CPU kernels: C (rows, cols) (+)= A (rows, depth) * B (depth, cols).
//
// B is depth-major: the operands of one depth lie side by side, consecutive depths `b_stride` operands apart (a panel of
// kTileCols columns, or a matrix whose rows are padded so that they do not fall into the same cache sets). A is read one element
// at a time: row-major (kRowMajor, rows `a_stride` apart) or column-major (depths `a_stride` apart). Whole tiles only: the caller
// pads. Every element of C is one chain of multiply-adds in the order of the depth, so its bits do not depend on the tile around
// it.
#pragma once

#include "core/simd/operand.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Accumulators take 12 of 16 registers, or 24 of 32; the rest holds one row of B and one element of A.
#if defined(FASTLM_SIMD_512)
constexpr int64_t kTileRows = 12;
#else
constexpr int64_t kTileRows = 6;
#endif
// Columns of a full tile: two vectors of sums.
template <class E>
constexpr int64_t kTileCols = 2 * lanes_of<operand_acc<E>>;

enum class Layout { kRowMajor, kColumnMajor };
// What the products are added to: nothing (zero), what C holds, or that times one factor per row.
enum class Start { kZero, kAdd, kScale };

template <class E, Layout kLayout, Start kStart, int kVecs>
FASTLM_INLINE void tile_body(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth, operand_acc<E>* c,
                             int64_t c_stride, const operand_acc<E>* row_factor) {
  using V = vec_t<operand_acc<E>>;
  constexpr int64_t kLanes = lanes_of<operand_acc<E>>;
  V sum[kTileRows][kVecs] = {};
  for (int64_t d = 0; d < depth; ++d) {
    operand_vec<E> row[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) row[v] = load_operands(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const operand_vec<E> x = broadcast_operand(kLayout == Layout::kRowMajor ? a[r * a_stride] : a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add(x, row[v], sum[r][v]);
    }
    a += kLayout == Layout::kRowMajor ? 1 : a_stride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      operand_acc<E>* to = c + r * c_stride + v * kLanes;
      if (kStart == Start::kAdd) sum[r][v] = load(to) + sum[r][v];
      if (kStart == Start::kScale) sum[r][v] = fma(load(to), broadcast<V>(row_factor[r]), sum[r][v]);
      store(to, sum[r][v]);
    }
  }
}

// One tile of kTileRows rows and kTileCols columns. `depth` counts operands (pairs, for bf16 pairs).
template <class E, Layout kLayout, Start kStart>
__attribute__((noinline)) void gemm_tile(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth,
                                         operand_acc<E>* c, int64_t c_stride, const operand_acc<E>* row_factor) {
  tile_body<E, kLayout, kStart, 2>(a, a_stride, b, b_stride, depth, c, c_stride, row_factor);
}

// Half as many columns.
template <class E, Layout kLayout, Start kStart>
__attribute__((noinline)) void gemm_half_tile(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth,
                                              operand_acc<E>* c, int64_t c_stride, const operand_acc<E>* row_factor) {
  tile_body<E, kLayout, kStart, 1>(a, a_stride, b, b_stride, depth, c, c_stride, row_factor);
}

// kTileRows rows of A and of C that are computed with together.
template <class E>
struct Strip {
  const E* a;                        // first element at depth (or panel column) 0
  operand_acc<E>* c;                 // first row
  const operand_acc<E>* row_factor;  // Start::kScale only
  int64_t begin, end;                // what of B counts: depths (gemm_strips), columns (gemm_panels); empty: nothing to do
};

// C (+)= A B for a few strips whose elements of A stay in the first-level cache; each strip has its own range of depths, counted
// in operands. Columns are rounded up to whole vectors; B is depth-major.
template <class E, Layout kLayout, Start kStart>
void gemm_strips(const Strip<E>* strips, int64_t num_strips, int64_t a_stride, const E* b, int64_t b_stride, int64_t c_stride,
                 int64_t cols) {
  for (int64_t n = 0; n < cols; n += kTileCols<E>) {
    const bool full = cols - n > kTileCols<E> / 2;
    for (int64_t i = 0; i < num_strips; ++i) {
      const Strip<E>& s = strips[i];
      if (s.begin >= s.end) continue;
      const E* a = s.a + s.begin * (kLayout == Layout::kRowMajor ? 1 : a_stride);
      const E* from = b + s.begin * b_stride + n;
      if (full) {
        gemm_tile<E, kLayout, kStart>(a, a_stride, from, b_stride, s.end - s.begin, s.c + n, c_stride, s.row_factor);
      } else {
        gemm_half_tile<E, kLayout, kStart>(a, a_stride, from, b_stride, s.end - s.begin, s.c + n, c_stride, s.row_factor);
      }
    }
  }
}

// C = A B for a few strips and a B in panels of kTileCols columns (pack_columns); each strip needs its own range of columns.
template <class E>
void gemm_panels(const Strip<E>* strips, int64_t num_strips, int64_t a_stride, const E* panels, int64_t depth, int64_t c_stride) {
  constexpr int64_t kCols = kTileCols<E>;
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t i = 0; i < num_strips; ++i) {
    if (strips[i].begin >= strips[i].end) continue;
    begin = min_of(begin, strips[i].begin / kCols * kCols);
    end = max_of(end, strips[i].end);
  }
  for (int64_t n = begin; n < end; n += kCols) {
    for (int64_t i = 0; i < num_strips; ++i) {
      const Strip<E>& s = strips[i];
      if (s.begin >= n + kCols || s.end <= n || s.begin >= s.end) continue;
      gemm_tile<E, Layout::kRowMajor, Start::kZero>(s.a, a_stride, panels + n * depth, kCols, depth, s.c + n, c_stride, nullptr);
    }
  }
}

// One row of C = factor C + A B, term by term: depths [begin, end) only, nothing beside them is read as a number. For the few
// tiles in which a masked operand is not finite, where 0 * operand would not be 0; the bits are those of a tile otherwise.
template <class E>
void gemm_row_exact(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t begin, int64_t end, operand_acc<E>* c,
                    int64_t cols, operand_acc<E> factor) {
  using V = vec_t<operand_acc<E>>;
  constexpr int64_t kDepth = depth_per_operand<E>;
  for (int64_t n = 0; n < cols; n += lanes_of<operand_acc<E>>) {
    V sum = zero<V>();
    for (int64_t d = begin / kDepth; d < operand_depth<E>(end); ++d) {
      auto row = load_operands(b + d * b_stride + n);
      if constexpr (kDepth == 2) {  // a pair may reach one depth beyond either end
        if (d * 2 < begin) row &= broadcast_operand(Bf16Pair{0xffff0000u});
        if (d * 2 + 1 >= end) row &= broadcast_operand(Bf16Pair{0x0000ffffu});
      }
      sum = multiply_add(broadcast_operand(a[d * a_stride]), row, sum);
    }
    store(c + n, fma(load(c + n), broadcast<V>(factor), sum));
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
