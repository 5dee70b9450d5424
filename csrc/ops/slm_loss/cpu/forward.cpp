// Per-token negative log-likelihood of a linear head: lse = log sum_v e^z_v, nll = lse - z_label, entropy = lse - sum_v p_v z_v.
// A piece of work packs a block of the vocabulary for itself and meets all tokens with it; each block of logits leaves its
// maximum m, its sum of e^(z-m) and of (z-m) e^(z-m) per token, which are added up in the order of the vocabulary. Bound by the
// product (2 n h V operations); the exponentials run over a block that is still in the second-level cache, in the order it lies
// there.
#include "core/scratch.h"
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"
#include "ops/slm_loss/cpu/pack.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::ForwardParams;
using slm_loss::kTokenBlock;
using slm_loss::kWordBlock;

// What is subtracted before exponentiating: the maximum, or 0 where every logit is -inf.
template <class V>
FASTLM_INLINE V reference_of(V maximum) {
  return maximum == -static_cast<typename ScalarOf<V>::type>(__builtin_inff()) ? V{} : maximum;
}

// Of N tokens over the words of a block.
template <class E, bool kEntropy>
void panel_statistics(const ForwardParams& p, const operand_acc<E>* z, int64_t words, int64_t at) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  constexpr int64_t kLanes = kOperandLanes<E>;
  V top[kPackedVectors], reference[kPackedVectors], sum[kPackedVectors] = {}, weighted[kPackedVectors] = {};
#pragma GCC unroll 8
  for (int v = 0; v < kPackedVectors; ++v) top[v] = broadcast<V>(-static_cast<A>(__builtin_inff()));
  for (int64_t w = 0; w < words; ++w) {
#pragma GCC unroll 8
    for (int v = 0; v < kPackedVectors; ++v) top[v] = max(load(z + w * kN + v * kLanes), top[v]);  // drops NaN
  }
#pragma GCC unroll 8
  for (int v = 0; v < kPackedVectors; ++v) reference[v] = reference_of(top[v]);
  for (int64_t w = 0; w < words; ++w) {
#pragma GCC unroll 8
    for (int v = 0; v < kPackedVectors; ++v) {
      const V t = shifted(load(z + w * kN + v * kLanes), reference[v]);
      const V e = exp_fast(t);
      sum[v] += e;
      if (kEntropy) weighted[v] = fma(e, t, weighted[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kPackedVectors; ++v) {
    store(static_cast<A*>(p.block_max) + at + v * kLanes, top[v]);
    store(static_cast<A*>(p.block_sum) + at + v * kLanes, sum[v]);
    if (kEntropy) store(static_cast<A*>(p.block_weighted) + at + v * kLanes, weighted[v]);
  }
}

template <class T>
void logits(const ForwardParams& p, int64_t piece) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t begin = piece * kWordBlock;
  const int64_t words = min_of(kWordBlock, p.vocab - begin);
  const int64_t runs = ceil_div(operand_depth<E>(p.hidden_size), kN);
  A* z = static_cast<A*>(thread_scratch(sizeof(A) * (kBlockSize + kWordBlock) + sizeof(E) * runs * kN * kWordBlock));
  if (z == nullptr) return;
  A* bias = z + kBlockSize;
  E* weight = reinterpret_cast<E*>(bias + kWordBlock);
  pack_rows<T, E>(words_of<T>(p, begin, begin + words), kWordBlock, weight, 0, ceil_div(words, kPackedRows) * kPackedRows);
  pack_bias(p, begin, begin + words, bias, 0, words);
  for (int64_t token = 0; token < p.num_tokens; token += kTokenBlock) {
    const Block block{0, words, token, min_of(kTokenBlock, p.num_tokens - token)};
    block_logits<E>(p, block, weight, kWordBlock, bias, z, kWordBlock * kN);
    for (int64_t t = 0; t < block.tokens; t += kN) {
      const A* panel = z + t * kWordBlock;
      const int64_t at = piece * p.capacity + token + t;
      p.entropy ? panel_statistics<E, true>(p, panel, words, at) : panel_statistics<E, false>(p, panel, words, at);
      const PanelLabels<E> labels(p.labels + token + t, block.tokens - t, begin, words);
      for (int64_t i = 0; i < kN; ++i) {
        if (labels.at[i] >= 0) static_cast<A*>(p.label_logit)[token + t + i] = panel[labels.at[i] * kN + i];
      }
    }
  }
}

// A vector of tokens at once.
template <class A>
void finish(const ForwardParams& p, int64_t piece) {
  using V = vec_t<A>;
  const A* block_max = static_cast<const A*>(p.block_max);
  const A* block_sum = static_cast<const A*>(p.block_sum);
  const A* block_weighted = static_cast<const A*>(p.block_weighted);
  const int64_t blocks = ceil_div(p.vocab, kWordBlock);
  const int64_t end = min_of((piece + 1) * kTokenBlock, p.num_tokens);
  for (int64_t token = piece * kTokenBlock; token < end; token += lanes_of<A>) {
    V top = broadcast<V>(-static_cast<A>(__builtin_inff()));
    for (int64_t b = 0; b < blocks; ++b) top = max(load(block_max + b * p.capacity + token), top);
    const V reference = reference_of(top);
    V sum = {};
    V weighted = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * p.capacity + token;
      const V t = shifted(load(block_max + at), reference);
      const V scale = exp(t);
      const V part = load(block_sum + at);
      sum = fma(scale, part, sum);
      if (p.entropy) weighted = fma(scale, fma(t, part, load(block_weighted + at)), weighted);
    }
    const V log_sum = log(sum);
    const V lse = top + log_sum;
    const V entropy = log_sum - weighted / sum;
    for (int64_t i = 0; i < min_of(lanes_of<A>, end - token); ++i) {
      const int64_t to = p.positions[token + i];
      static_cast<A*>(p.lse)[to] = lse[i];
      // Not lse - z: the maximum and the label's logit are close, and lse has lost what log_sum has below their last digit.
      static_cast<A*>(p.nll)[to] = (top[i] - static_cast<const A*>(p.label_logit)[token + i]) + log_sum[i];
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
