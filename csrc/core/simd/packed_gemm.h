// C (+)= A B for operands packed beforehand, one register tile at a time. Per-level code: included by kernels only.
//
// Elements lie in words: one float, one double, or (where the CPU multiplies bf16) two bf16 of neighbouring k. A tile is
// kTileRows x kColumns of C, kColumns being a few vectors; with N = kColumns and all k counted in words, the layouts are
//   columns of B    (cols / N, k, N)      what B is read from: N columns, one k after the other
//   rows of A       (k / N, rows, N)      for words, the same memory as "columns of B" with k and columns exchanged, so one packed
//                                         matrix of floats serves as A of one product and as B of another
//   transposed A    (rows / N, k, N)      "columns of B" read as A: for products with a transposed matrix
// Packed memory is padded to whole tiles, so a tile is never cut; what lies in the padding of C is never looked at. Sums over k run in
// order, in blocks of kTileDepth, so that the columns of B in use (kTileDepth x N words) stay in the first-level cache.
#pragma once

#include "core/simd/simd.h"

// The generic form of the bf16 product below is exact enough to test the layouts on levels that lack the instruction.
#if defined(__AVX512BF16__) || defined(FASTLM_TEST_BF16_PAIRS)
#define FASTLM_BF16_PAIRS 1
#endif

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// bf16 of k (low half) and k + 1 (high half).
struct Bf16Pair {
  uint32_t bits;
};

// What a tensor of T is multiplied in.
template <class T>
struct WordOf {
  using type = acc_t<T>;
};
#if defined(FASTLM_BF16_PAIRS)
template <>
struct WordOf<bfloat16> {
  using type = Bf16Pair;
};
#endif
template <class T>
using word_t = typename WordOf<T>::type;

#if defined(FASTLM_SIMD_512)
constexpr int kTileRows = 8;     // 16 sums of 32 registers; N = 32 divides the usual widths
constexpr int kTileVectors = 2;
#elif defined(FASTLM_SIMD_256)
constexpr int kTileRows = 4;     // 12 sums of 16 registers
constexpr int kTileVectors = 3;
#else
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int64_t kTileDepth = 192;  // with 32 columns of floats: 24 KiB; a multiple of N on every level

// kGroup: elements per word. Words: a vector of words. Sum: a vector of C.
template <class W>
struct Tile {
  using Acc = W;
  using Sum = vec_t<W>;
  using Words = vec_t<W>;
  static constexpr int kGroup = 1;
};
template <>
struct Tile<Bf16Pair> {
  using Acc = float;
  using Sum = VecF;
  using Words = VecI;
  static constexpr int kGroup = 2;
};
template <class W>
constexpr int kLanes = VectorOf<typename Tile<W>::Acc>::lanes;
template <class W>
constexpr int kColumns = kTileVectors * kLanes<W>;  // N

FASTLM_INLINE VecF broadcast_word(const float* p) { return broadcast<VecF>(*p); }
FASTLM_INLINE VecD broadcast_word(const double* p) { return broadcast<VecD>(*p); }
FASTLM_INLINE VecI broadcast_word(const Bf16Pair* p) { return VecI{} + static_cast<int32_t>(p->bits); }

FASTLM_INLINE VecF load_words(const float* p) { return load(p); }
FASTLM_INLINE VecD load_words(const double* p) { return load(p); }
FASTLM_INLINE VecI load_words(const Bf16Pair* p) {
  VecI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

FASTLM_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return fma(a, b, sum); }
FASTLM_INLINE VecD multiply_add(VecD a, VecD b, VecD sum) { return fma(a, b, sum); }
FASTLM_INLINE VecF multiply_add(VecI a, VecI b, VecF sum) {
#if defined(__AVX512BF16__) && defined(FASTLM_SIMD_512)
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum = fma((VecF)(a << 16), (VecF)(b << 16), sum);
  return fma((VecF)(a & static_cast<int32_t>(0xffff0000)), (VecF)(b & static_cast<int32_t>(0xffff0000)), sum);
#endif
}

// How the tile finds A: rows of A (row stride N, k within N side by side) or transposed A (rows side by side, k stride N).
enum class Layout { kRows, kTransposed };

template <class W, Layout kLayout>
FASTLM_INLINE void tile_step(const W* a, const W* b, typename Tile<W>::Sum (&sum)[kTileRows][kTileVectors]) {
  constexpr int64_t kRowStride = kLayout == Layout::kRows ? kColumns<W> : 1;
  typename Tile<W>::Words column[kTileVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) column[v] = load_words(b + v * kLanes<W>);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    const typename Tile<W>::Words row = broadcast_word(a + r * kRowStride);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = multiply_add(row, column[v], sum[r][v]);
  }
}

// One tile of C over `depth` words of k, from a word that begins a run of N.
template <class W, Layout kLayout>
FASTLM_INLINE void multiply_tile(const W* a, int64_t a_run_stride, const W* b, int64_t depth, typename Tile<W>::Acc* c,
                                 int64_t c_row_stride, bool add) {
  using Sum = typename Tile<W>::Sum;
  constexpr int64_t kN = kColumns<W>;
  Sum sum[kTileRows][kTileVectors] = {};
  if constexpr (kLayout == Layout::kTransposed) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) tile_step<W, kLayout>(a + k * kN, b + k * kN, sum);
  } else {
    int64_t k = 0;
    for (; k + kN <= depth; k += kN) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kN; ++i) tile_step<W, kLayout>(a + i, b + i * kN, sum);
      a += a_run_stride;
      b += kN * kN;
    }
    for (int64_t i = 0; i < depth - k; ++i) tile_step<W, kLayout>(a + i, b + i * kN, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      auto* to = c + r * c_row_stride + v * kLanes<W>;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// A block of C. Strides in words (a, b) and elements (c).
template <class W>
struct Product {
  const W* a;              // first row
  int64_t a_stride;        // rows of A: from one run of N words of k to the next; transposed A: from one run of N rows to the next
  const W* b;              // first panel of N columns
  int64_t b_panel_stride;  // from one panel to the next
  typename Tile<W>::Acc* c;
  int64_t c_row_stride;
  int64_t c_panel_stride;
  int64_t depth;    // words of k
  int64_t rows;     // multiple of kTileRows; transposed A: begins at a multiple of N
  int64_t columns;  // multiple of N
  bool add;         // to what is in C, instead of overwriting it
};

template <class W, Layout kLayout>
void multiply(const Product<W>& p) {
  constexpr int64_t kN = kColumns<W>;
  int64_t k = 0;
  do {  // once at least: an empty sum still writes zeros
    const int64_t depth = min_of(kTileDepth, p.depth - k);
    const bool add = p.add || k > 0;
    for (int64_t panel = 0; panel < p.columns / kN; ++panel) {
      const W* b = p.b + panel * p.b_panel_stride + k * kN;
      for (int64_t row = 0; row < p.rows; row += kTileRows) {
        const W* a = kLayout == Layout::kRows ? p.a + (k / kN) * p.a_stride + row * kN
                                              : p.a + (row / kN) * p.a_stride + row % kN + k * kN;
        auto* c = p.c + row * p.c_row_stride + panel * p.c_panel_stride;
        multiply_tile<W, kLayout>(a, p.a_stride, b, depth, c, p.c_row_stride, add);
      }
    }
    k += kTileDepth;
  } while (k < p.depth);
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
