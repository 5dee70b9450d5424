// The logits of one block of rows and columns, in per-thread scratch: what both passes begin with. Per-level code.
#pragma once

#include "core/scratch.h"
#include "core/simd/packed_gemm.h"
#include "ops/slm_loss/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// A block: rows [row, row + rows) of the group and columns [column, column + columns) of the panel.
struct Block {
  int64_t row, rows;
  int64_t column, columns;
};

// Piece number `piece` of a step, blocks of one row block side by side.
FASTLM_INLINE Block find_block(const slm_loss::Step& s, int64_t piece) {
  using slm_loss::kColumnBlock;
  using slm_loss::kRowBlock;
  const int64_t rows = s.row_end - s.row_begin;
  const int64_t columns = s.vocab_end - s.vocab_begin;
  const int64_t across = ceil_div(columns, kColumnBlock);
  const int64_t row = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  return {row, min_of(kRowBlock, rows - row), column, min_of(kColumnBlock, columns - column)};
}

// Where element (row, column) of a block lies: (columns / N, kRowBlock, N).
template <class E>
FASTLM_INLINE int64_t block_offset(int64_t row, int64_t column) {
  constexpr int64_t kN = kPackedColumns<E>;
  return ((column / kN) * slm_loss::kRowBlock + row) * kN + column % kN;
}

// e^x for x <= 0 (and NaN): relative error 4e-7 near 0, growing with |x|; 0 below -88.
FASTLM_INLINE VecF exp_fast(VecF x) { return exp2_fast(x * kLog2e); }
FASTLM_INLINE VecD exp_fast(VecD x) { return exp(x); }

// z - reference, kept finite where z is -inf so that 0 * it is 0. NaN stays NaN.
template <class V>
FASTLM_INLINE V shifted(V z, V reference) {
  const V t = z - reference;
  return t < -1000 ? V{} - 1000 : t;
}

// z = hidden . weight + bias, then softcap * tanh(z / softcap). Columns beyond the block's last one are -inf: they have no share
// in any softmax and gradient 0.
template <class E>
operand_acc<E>* block_logits(const slm_loss::Params& p, const Block& block) {
  using A = operand_acc<E>;
  using V = vec_t<operand_acc<E>>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t words = ceil_div(p.hidden_size, depth_per_operand<E>);
  const int64_t columns = ceil_div(block.columns, kN) * kN;
  A* z = static_cast<A*>(thread_scratch(sizeof(A) * slm_loss::kRowBlock * slm_loss::kColumnBlock));
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(p.hidden_rows) + block.row * kN;
  product.a_stride = p.group_size * kN;
  product.b = static_cast<const E*>(p.weight_columns) + block.column * words;
  product.b_panel_stride = words * kN;
  product.c = z;
  product.c_row_stride = kN;
  product.c_panel_stride = slm_loss::kRowBlock * kN;
  product.depth = words;
  product.rows = ceil_div(block.rows, kPackedRows) * kPackedRows;
  product.columns = columns;
  packed_multiply<E, PackedA::kRows>(product);

  if (p.bias != nullptr || p.softcap > 0) {
    const A* bias = static_cast<const A*>(p.bias_packed) + block.column;
    const V cap = broadcast<V>(static_cast<A>(p.softcap));
    const V inverse = broadcast<V>(p.softcap > 0 ? static_cast<A>(1 / p.softcap) : A(0));
    for (int64_t c = 0; c < columns; c += kOperandLanes<E>) {
      const V b = load(bias + c);
      for (int64_t r = 0; r < block.rows; ++r) {
        A* at = z + block_offset<E>(r, c);
        V v = load(at) + b;
        if (p.softcap > 0) v = cap * tanh(v * inverse);
        store(at, v);
      }
    }
  }
  for (int64_t c = block.columns; c < columns; ++c) {
    for (int64_t r = 0; r < block.rows; ++r) z[block_offset<E>(r, c)] = -static_cast<A>(__builtin_inff());
  }
  return z;
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
