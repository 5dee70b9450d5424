// C (+)= A B for operands packed beforehand, one register tile at a time. For products large enough that packing both sides pays
// (gemm.h has the tile for operands that lie in a matrix). Per-level code: included by kernels only.
//
// A tile is kPackedRows x N of C, N = kPackedColumns being a few vectors. With k counted in operands (pairs, for bf16 pairs):
//   rows of A       (k / N, rows, N)      runs of N values of k, row after row
//   columns of B    (cols / N, k, N)      N columns, one k after the other
//   transposed A    (rows / N, k, N)      columns of B, read as A
// For single values "rows of A" is the same memory as "columns of B" with k and columns exchanged: one packed matrix serves as A
// of one product and as B of another. Packed memory is padded to whole tiles, so a tile is never cut; what lies in the padding of
// C is never looked at; vectors of a last panel that hold nothing can be left out. Sums over k run in order, in blocks: the
// columns of B in use then stay in the first-level cache.
#pragma once

#include "core/simd/operand.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

#if defined(FASTLM_SIMD_512)
constexpr int kPackedRows = 8;  // 16 sums of 32 registers; N = 32 divides the usual widths
constexpr int kPackedVectors = 2;
#elif defined(FASTLM_SIMD_256)
constexpr int kPackedRows = 4;  // 12 sums of 16 registers
constexpr int kPackedVectors = 3;
#else
constexpr int kPackedRows = 4;
constexpr int kPackedVectors = 2;
#endif
constexpr int64_t kPackedDepth = 192;  // with 32 columns of floats: 24 KiB; a multiple of N on every level

template <class E>
constexpr int64_t kOperandLanes = lanes_of<operand_acc<E>>;
template <class E>
constexpr int64_t kPackedColumns = kPackedVectors * kOperandLanes<E>;  // N

// How the tile finds A: rows of A (row stride N, k within N side by side) or transposed A (rows side by side, k stride N).
enum class PackedA { kRows, kTransposed };

template <class E, PackedA kForm, int kVecs>
FASTLM_INLINE void packed_step(const E* a, const E* b, vec_t<operand_acc<E>> (&sum)[kPackedRows][kVecs]) {
  constexpr int64_t kRowStride = kForm == PackedA::kRows ? kPackedColumns<E> : 1;
  operand_vec<E> column[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) column[v] = load_operands(b + v * kOperandLanes<E>);
#pragma GCC unroll 8
  for (int r = 0; r < kPackedRows; ++r) {
    const operand_vec<E> row = broadcast_operand(a[r * kRowStride]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add(row, column[v], sum[r][v]);
  }
}

// One tile of C over `depth` operands of k, from an operand that begins a run of N; the first kVecs vectors of the columns.
template <class E, PackedA kForm, int kVecs, class Out>
FASTLM_INLINE void packed_tile(const E* a, int64_t a_run_stride, const E* b, int64_t depth, Out* c, int64_t c_row_stride,
                               bool add) {
  using Sum = vec_t<operand_acc<E>>;
  constexpr int64_t kN = kPackedColumns<E>;
  Sum sum[kPackedRows][kVecs] = {};
  for (int r = 0; r < kPackedRows; ++r) {
    __builtin_prefetch(c + r * c_row_stride, 1, 2);
    __builtin_prefetch(c + r * c_row_stride + kVecs * kOperandLanes<E> - 1, 1, 2);
  }
  if constexpr (kForm == PackedA::kTransposed) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) packed_step<E, kForm, kVecs>(a + k * kN, b + k * kN, sum);
  } else {
    int64_t k = 0;
    for (; k + kN <= depth; k += kN) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kN; ++i) packed_step<E, kForm, kVecs>(a + i, b + i * kN, sum);
      a += a_run_stride;
      b += kN * kN;
    }
    for (int64_t i = 0; i < depth - k; ++i) packed_step<E, kForm, kVecs>(a + i, b + i * kN, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPackedRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Out* to = c + r * c_row_stride + v * kOperandLanes<E>;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// Memory that will be read when a product is done, in one or two stretches of rows: it is fetched into the second-level cache
// meanwhile, a share with every tile.
struct Ahead {
  const char* row[2];
  int64_t rows[2];
  int64_t row_stride;  // bytes
  int64_t row_bytes;
};
struct AheadCursor {
  Ahead left;
  int64_t line = 0, stretch = 0, share;

  FASTLM_INLINE AheadCursor(const Ahead& ahead, int64_t tiles) : left(ahead) {
    share = ceil_div((ahead.rows[0] + ahead.rows[1]) * ceil_div(ahead.row_bytes, 64), max_of(tiles, 1));
  }
  FASTLM_INLINE void fetch_share() {
    for (int64_t i = 0; i < share; ++i) {
      while (stretch < 2 && left.rows[stretch] == 0) ++stretch;
      if (stretch == 2) return;
      __builtin_prefetch(left.row[stretch] + line, 0, 2);
      line += 64;
      if (line < left.row_bytes) continue;
      line = 0;
      left.row[stretch] += left.row_stride;
      --left.rows[stretch];
    }
  }
};

// A block of C. Strides in operands (a, b) and elements (c). Out: what C is made of; anything narrower than the sums is rounded
// with every store, so it is for sums that are complete in one go, `block` operands of k.
template <class E, class Out = operand_acc<E>>
struct PackedProduct {
  const E* a;        // first row
  int64_t a_stride;  // rows of A: from one run of N operands of k to the next; transposed A: from one run of N rows to the next
  const E* b;        // first panel of N columns
  int64_t b_panel_stride;  // from one panel to the next
  Out* c;
  int64_t c_row_stride;
  int64_t c_panel_stride;
  int64_t depth;                 // operands of k
  int64_t rows;                  // multiple of kPackedRows; transposed A: begins at a multiple of N
  int64_t columns;               // multiple of the lanes of a vector
  bool add;                      // to what is in C, instead of overwriting it
  int64_t block = kPackedDepth;  // operands of k summed in one go, a multiple of N: with it the order of the sum is given
  Ahead ahead;                   // what the caller reads next
};

// The columns of B that come after those in use are fetched into the second-level cache meanwhile, a share with every tile: 5 %.
template <class E>
FASTLM_INLINE void prefetch_share(const E* next, int64_t operands, int64_t tile, int64_t tiles) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(E));
  const int64_t share = ceil_div(ceil_div(operands, kLine), tiles) * kLine;
  for (int64_t i = 0; i < share; i += kLine) __builtin_prefetch(next + tile * share + i, 0, 2);
}

// One panel of columns, of which the first kVecs vectors count, times all rows.
template <class E, PackedA kForm, int kVecs, class Out>
void packed_panel(const PackedProduct<E, Out>& p, int64_t panel, int64_t k, AheadCursor& ahead) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t depth = min_of(p.block, p.depth - k);
  const E* b = p.b + panel * p.b_panel_stride + k * kN;
  for (int64_t row = 0; row < p.rows; row += kPackedRows) {
    prefetch_share(b + p.b_panel_stride, depth * kN, row / kPackedRows, p.rows / kPackedRows);
    ahead.fetch_share();
    const E* a =
        kForm == PackedA::kRows ? p.a + (k / kN) * p.a_stride + row * kN : p.a + (row / kN) * p.a_stride + row % kN + k * kN;
    auto* c = p.c + row * p.c_row_stride + panel * p.c_panel_stride;
    packed_tile<E, kForm, kVecs>(a, p.a_stride, b, depth, c, p.c_row_stride, p.add || k > 0);
  }
}

template <class E, PackedA kForm, class Out>
void packed_multiply(const PackedProduct<E, Out>& p) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t panels = p.columns / kN;
  const int64_t rest = p.columns % kN / kOperandLanes<E>;  // vectors of the last panel, if it is not whole
  const int64_t passes = max_of(ceil_div(p.depth, p.block), 1);
  AheadCursor ahead(p.ahead, passes * ceil_div(p.columns, kN) * (p.rows / kPackedRows));
  int64_t k = 0;
  do {  // once at least: an empty sum still writes zeros
    for (int64_t panel = 0; panel < panels; ++panel) packed_panel<E, kForm, kPackedVectors>(p, panel, k, ahead);
    if (rest == 1) packed_panel<E, kForm, 1>(p, panels, k, ahead);
    if constexpr (kPackedVectors == 3) {
      if (rest == 2) packed_panel<E, kForm, 2>(p, panels, k, ahead);
    }
    k += p.block;
  } while (k < p.depth);
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
