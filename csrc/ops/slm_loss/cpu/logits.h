// The logits of one block of rows and columns: what both passes begin with. Per-level code.
#pragma once

#include "core/simd/packed_gemm.h"
#include "ops/slm_loss/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Rows [row, row + rows) of the packed hidden states and `columns` words of the vocabulary.
struct Block {
  int64_t row, rows;
  int64_t columns;
};

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

constexpr int64_t kBlockSize = slm_loss::kRowBlock * slm_loss::kColumnBlock;

// z = hidden . weight + bias, then softcap * tanh(z / softcap). `weight` are packed columns of B, `bias` their biases. Columns
// beyond the block's last one are -inf: they have no share in any softmax.
template <class E>
void block_logits(const slm_loss::Params& p, const Block& block, const E* weight, const operand_acc<E>* bias, operand_acc<E>* z) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t columns = ceil_div(block.columns, kN) * kN;
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(p.hidden_rows) + block.row * kN;
  product.a_stride = p.capacity * kN;
  product.b = weight;
  product.b_panel_stride = operand_depth<E>(p.hidden_size) * kN;
  product.c = z;
  product.c_row_stride = kN;
  product.c_panel_stride = slm_loss::kRowBlock * kN;
  product.depth = operand_depth<E>(p.hidden_size);
  product.rows = ceil_div(block.rows, kPackedRows) * kPackedRows;
  product.columns = columns;
  packed_multiply<E, PackedA::kRows>(product);

  if (p.bias != nullptr || p.softcap > 0) {
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
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
