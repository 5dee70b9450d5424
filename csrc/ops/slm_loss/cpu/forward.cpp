// Per-token negative log-likelihood of a linear head: lse = log sum_v e^z_v, nll = lse - z_label, entropy = lse - sum_v p_v z_v.
// A piece of work packs a block of the vocabulary for itself and meets all rows with it; each block of logits leaves its maximum
// m, its sum of e^(z-m) and of (z-m) e^(z-m) per row, which are added up in the order of the vocabulary. Bound by the product (2
// n h V operations); the exponentials run over a block that is still in the second-level cache.
#include "core/scratch.h"
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"
#include "ops/slm_loss/cpu/pack.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::ForwardParams;
using slm_loss::kColumnBlock;
using slm_loss::kRowBlock;

// What is subtracted before exponentiating: the maximum, or 0 where every logit is -inf.
template <class V>
FASTLM_INLINE V reference_of(V maximum) {
  return maximum == -static_cast<typename ScalarOf<V>::type>(__builtin_inff()) ? V{} : maximum;
}

template <class E>
void row_statistics(const ForwardParams& p, const operand_acc<E>* z, int64_t row, int64_t columns, int64_t at) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  V top = broadcast<V>(-static_cast<A>(__builtin_inff()));
  for (int64_t c = 0; c < columns; c += kOperandLanes<E>) top = max(load(z + block_offset<E>(row, c)), top);  // drops NaN
  const A maximum = reduce_max(top);
  const V reference = reference_of(broadcast<V>(maximum));
  V sum = {};
  V weighted = {};
  if (p.entropy) {
    for (int64_t c = 0; c < columns; c += kOperandLanes<E>) {
      const V t = shifted(load(z + block_offset<E>(row, c)), reference);
      const V e = exp_fast(t);
      sum += e;
      weighted = fma(e, t, weighted);
    }
    static_cast<A*>(p.block_weighted)[at] = reduce_add(weighted);
  } else {
    for (int64_t c = 0; c < columns; c += kOperandLanes<E>) {
      sum += exp_fast(shifted(load(z + block_offset<E>(row, c)), reference));
    }
  }
  static_cast<A*>(p.block_max)[at] = maximum;
  static_cast<A*>(p.block_sum)[at] = reduce_add(sum);
}

template <class T>
void logits(const ForwardParams& p, int64_t piece) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  const int64_t begin = piece * kColumnBlock;
  const int64_t end = min_of(begin + kColumnBlock, p.vocab);
  const int64_t columns = ceil_div(end - begin, kPackedColumns<E>) * kPackedColumns<E>;
  A* z = static_cast<A*>(
      thread_scratch(sizeof(A) * (kBlockSize + kColumnBlock) + sizeof(E) * operand_depth<E>(p.hidden_size) * kColumnBlock));
  if (z == nullptr) return;
  A* bias = z + kBlockSize;
  E* weight = reinterpret_cast<E*>(bias + kColumnBlock);
  pack_columns<T, E>(weight_rows_of<T>(p, begin, end), weight, 0, columns);
  pack_bias(p, begin, end, bias, 0, columns);
  for (int64_t row = 0; row < p.num_rows; row += kRowBlock) {
    const Block block{row, min_of(kRowBlock, p.num_rows - row), end - begin};
    block_logits<E>(p, block, weight, bias, z);
    for (int64_t r = 0; r < block.rows; ++r) {
      row_statistics<E>(p, z, r, columns, piece * p.capacity + row + r);
      const int64_t label = p.labels[row + r] - begin;
      if (label >= 0 && label < end - begin) static_cast<A*>(p.label_logit)[row + r] = z[block_offset<E>(r, label)];
    }
  }
}

// A vector of rows at once.
template <class A>
void finish(const ForwardParams& p, int64_t piece) {
  using V = vec_t<A>;
  const A* block_max = static_cast<const A*>(p.block_max);
  const A* block_sum = static_cast<const A*>(p.block_sum);
  const A* block_weighted = static_cast<const A*>(p.block_weighted);
  const int64_t blocks = ceil_div(p.vocab, kColumnBlock);
  const int64_t end = min_of((piece + 1) * kRowBlock, p.num_rows);
  for (int64_t row = piece * kRowBlock; row < end; row += lanes_of<A>) {
    V top = broadcast<V>(-static_cast<A>(__builtin_inff()));
    for (int64_t b = 0; b < blocks; ++b) top = max(load(block_max + b * p.capacity + row), top);
    const V reference = reference_of(top);
    V sum = {};
    V weighted = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * p.capacity + row;
      const V t = shifted(load(block_max + at), reference);
      const V scale = exp(t);
      const V part = load(block_sum + at);
      sum = fma(scale, part, sum);
      if (p.entropy) weighted = fma(scale, fma(t, part, load(block_weighted + at)), weighted);
    }
    const V log_sum = log(sum);
    const V lse = top + log_sum;
    const V entropy = log_sum - weighted / sum;
    for (int64_t i = 0; i < min_of(lanes_of<A>, end - row); ++i) {
      const int64_t to = p.rows[row + i];
      static_cast<A*>(p.lse)[to] = lse[i];
      // Not lse - z: the maximum and the label's logit are close, and lse has lost what log_sum has below their last digit.
      static_cast<A*>(p.nll)[to] = (top[i] - static_cast<const A*>(p.label_logit)[row + i]) + log_sum[i];
      if (p.entropy) static_cast<A*>(p.entropy_out)[to] = entropy[i];
    }
  }
}

}  // namespace

extern const slm_loss::ForwardKernels slm_loss_forward;
const slm_loss::ForwardKernels slm_loss_forward = {
    {logits<float>, logits<bfloat16>, logits<float16>, logits<double>},
    {finish<float>, finish<float>, finish<float>, finish<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
