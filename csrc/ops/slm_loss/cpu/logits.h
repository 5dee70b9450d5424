// The logits of one block of words and tokens: what both passes begin with. A row holds one word, its lanes are tokens; rows lie
// in panels of N tokens, (tokens / N, words, N). Per-level code.
#pragma once

#include "core/simd/packed_gemm.h"
#include "ops/slm_loss/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Words [word, word + words) of a packed panel of the weight, tokens [token, token + tokens) of the packed hidden states.
struct Block {
  int64_t word, words;
  int64_t token, tokens;
};

constexpr int64_t kBlockSize = slm_loss::kWordBlock * slm_loss::kTokenBlock;

// e^x for x <= 0 (and NaN): relative error 4e-7 near 0, growing with |x|; 0 below -88.
FASTLM_INLINE VecF exp_fast(VecF x) { return exp2_fast(x * kLog2e); }
FASTLM_INLINE VecD exp_fast(VecD x) { return exp(x); }

// z - reference, kept finite where z is -inf so that 0 * it is 0. NaN stays NaN.
template <class V>
FASTLM_INLINE V shifted(V z, V reference) {
  return max(V{} - 1000, z - reference);  // the order keeps NaN
}

template <class E>
void add_bias(const slm_loss::Params& p, const Block& block, const operand_acc<E>* bias, operand_acc<E>* z,
              int64_t panel_stride) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  const V cap = broadcast<V>(static_cast<A>(p.softcap));
  const V inverse = broadcast<V>(p.softcap > 0 ? static_cast<A>(1 / p.softcap) : A(0));
  for (int64_t t = 0; t < block.tokens; t += kN) {
    A* panel = z + t / kN * panel_stride;
    for (int64_t w = 0; w < block.words; ++w) {
      const V b = broadcast<V>(bias[block.word + w]);
      for (int64_t i = 0; i < kN; i += kOperandLanes<E>) {
        V v = load(panel + w * kN + i) + b;
        if (p.softcap > 0) v = cap * tanh(v * inverse);
        store(panel + w * kN + i, v);
      }
    }
  }
}

// z = weight . hidden + bias, then softcap * tanh(z / softcap). `weight` are packed rows of A, `size` of them, `bias` their
// biases. Tokens beyond the block's last one get values that mean nothing.
template <class E>
void block_logits(const slm_loss::Params& p, const Block& block, const E* weight, int64_t size, const operand_acc<E>* bias,
                  operand_acc<E>* z, int64_t panel_stride) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t depth = operand_depth<E>(p.hidden_size);
  PackedProduct<E> product{};
  product.a = weight + block.word * kN;
  product.a_stride = size * kN;
  product.b = static_cast<const E*>(p.hidden_columns) + block.token * depth;
  product.b_panel_stride = depth * kN;
  product.c = z;
  product.c_row_stride = kN;
  product.c_panel_stride = panel_stride;
  product.depth = depth;
  product.rows = ceil_div(block.words, kPackedRows) * kPackedRows;
  product.columns = ceil_div(block.tokens, kN) * kN;
  packed_multiply<E, PackedA::kRows>(product);
  if (p.bias != nullptr || p.softcap > 0) add_bias<E>(p, block, bias, z, panel_stride);
}

// The label of each token of a panel of N, counted from word `first`; -1 where it is none of the `words` after that.
template <class E>
struct PanelLabels {
  using Index = decltype(typename VectorOf<operand_acc<E>>::mask{}[0] + 0);
  Index at[kPackedColumns<E>];

  FASTLM_INLINE PanelLabels(const int64_t* labels, int64_t tokens, int64_t first, int64_t words) {
    for (int64_t i = 0; i < kPackedColumns<E>; ++i) {
      const int64_t label = i < tokens ? labels[i] - first : -1;
      at[i] = static_cast<Index>(label < words ? label : -1);
    }
  }
};

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
