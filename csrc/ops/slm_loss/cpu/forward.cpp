// Per-token negative log-likelihood of a linear head: lse = log sum_v exp(z_v), nll = lse - z_label, entropy = lse - sum_v p_v
// z_v. Each block of logits leaves its maximum m, sum of e^(z-m) and sum of (z-m) e^(z-m) per row; they are merged in the order
// of the vocabulary. Bound by the product (2 T h V operations); the exponentials run over a block that is still in the
// second-level cache.
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::ForwardParams;
using slm_loss::kColumnBlock;
using slm_loss::kRowBlock;
using slm_loss::Step;

// What a maximum subtracts: itself, or 0 when every logit is -inf.
template <class A>
FASTLM_INLINE A reference_of(A maximum) {
  return maximum == -static_cast<A>(__builtin_inff()) ? A(0) : maximum;
}

// e^(from - to) for two maxima, 0 if there is nothing at `from`.
template <class A>
FASTLM_INLINE A rescale(A from, A to) {
  using V = typename VectorOf<A>::type;
  if (from == -static_cast<A>(__builtin_inff())) return A(0);
  return exp(broadcast<V>(from - to))[0];
}

template <class E>
void row_statistics(const ForwardParams& p, const operand_acc<E>* z, int64_t row, int64_t columns, int64_t at) {
  using A = operand_acc<E>;
  using V = vec_t<operand_acc<E>>;
  V top = broadcast<V>(-static_cast<A>(__builtin_inff()));
  for (int64_t c = 0; c < columns; c += kOperandLanes<E>) top = max(load(z + block_offset<E>(row, c)), top);  // drops NaN
  const A maximum = reduce_max(top);
  const V reference = broadcast<V>(reference_of(maximum));
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

template <class E>
void logits(const ForwardParams& p, const Step& s, int64_t begin, int64_t end) {
  using A = operand_acc<E>;
  constexpr int64_t kN = kPackedColumns<E>;
  for (int64_t piece = begin; piece < end; ++piece) {
    const Block block = find_block(s, piece);
    const A* z = block_logits<E>(p, block);
    const int64_t columns = ceil_div(block.columns, kN) * kN;
    for (int64_t r = 0; r < block.rows; ++r) {
      row_statistics<E>(p, z, r, columns, block.column / kColumnBlock * p.group_size + block.row + r);
      const int64_t row = s.row_begin + block.row + r;
      const int64_t label = p.labels[row] - s.vocab_begin - block.column;
      if (label >= 0 && label < block.columns) static_cast<A*>(p.row_label)[row] = z[block_offset<E>(r, label)];
    }
  }
}

template <class A>
void merge(const ForwardParams& p, const Step& s, int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(s.vocab_end - s.vocab_begin, kColumnBlock);
  const A* block_max = static_cast<const A*>(p.block_max);
  const A* block_sum = static_cast<const A*>(p.block_sum);
  const A* block_weighted = static_cast<const A*>(p.block_weighted);
  for (int64_t r = begin * kRowBlock; r < min_of(end * kRowBlock, s.row_end - s.row_begin); ++r) {
    const int64_t row = s.row_begin + r;
    const bool first = s.vocab_begin == 0;
    A maximum = first ? -static_cast<A>(__builtin_inff()) : static_cast<A*>(p.row_max)[row];
    A sum = first ? A(0) : static_cast<A*>(p.row_sum)[row];
    A weighted = first || !p.entropy ? A(0) : static_cast<A*>(p.row_weighted)[row];
    for (int64_t b = 0; b < blocks; ++b) {
      const A other = block_max[b * p.group_size + r];
      const A top = maximum > other ? maximum : other;
      const A keep = rescale(maximum, top);
      const A take = rescale(other, top);
      if (p.entropy) {
        // sum of e^(z-top) (z-top): each part's (z-m) is off by m - top.
        const A keep_shift = maximum == -static_cast<A>(__builtin_inff()) ? A(0) : maximum - top;
        const A take_shift = other == -static_cast<A>(__builtin_inff()) ? A(0) : other - top;
        weighted = keep * (weighted + keep_shift * sum) +
                   take * (block_weighted[b * p.group_size + r] + take_shift * block_sum[b * p.group_size + r]);
      }
      sum = keep * sum + take * block_sum[b * p.group_size + r];
      maximum = top;
    }
    static_cast<A*>(p.row_max)[row] = maximum;
    static_cast<A*>(p.row_sum)[row] = sum;
    if (p.entropy) static_cast<A*>(p.row_weighted)[row] = weighted;
  }
}

template <class A>
void finish(const ForwardParams& p, const Step& s, int64_t begin, int64_t end) {
  using V = typename VectorOf<A>::type;
  for (int64_t row = begin * kRowBlock; row < min_of(end * kRowBlock, s.row_end); ++row) {
    const A maximum = static_cast<const A*>(p.row_max)[row];
    const A sum = static_cast<const A*>(p.row_sum)[row];
    const A log_sum = log(broadcast<V>(sum))[0];
    const int64_t to = p.rows[row];
    static_cast<A*>(p.lse)[to] = maximum + log_sum;
    // Not lse - z: the maximum and the label's logit are close, and lse has lost what log_sum has below their last digit.
    static_cast<A*>(p.nll)[to] = (maximum - static_cast<const A*>(p.row_label)[row]) + log_sum;
    if (p.entropy) static_cast<A*>(p.entropy_out)[to] = log_sum - static_cast<const A*>(p.row_weighted)[row] / sum;
  }
}

}  // namespace

extern const slm_loss::ForwardKernels slm_loss_forward;
const slm_loss::ForwardKernels slm_loss_forward = {
    {logits<operand_t<float>>, logits<operand_t<bfloat16>>, logits<operand_t<float16>>, logits<operand_t<double>>},
    {merge<float>, merge<float>, merge<float>, merge<double>},
    {finish<float>, finish<float>, finish<float>, finish<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
