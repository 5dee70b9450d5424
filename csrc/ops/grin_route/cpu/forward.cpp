// GRIN's router, forward: picks one after the other, each from a softmax over the experts that survive the mask.
// Source: Liu et al., "GRIN: GRadient-INformed MoE", arXiv 2409.12136, equations 2 and 8; its public code decides the mask.
//
// Most tokens have a single survivor, whose weight is 1: no exponential and no random number is computed for an expert unless it
// survives beside the largest one in some token of the block. What bounds it is arithmetic: the chain of comparisons that finds
// the largest logit and the quotients of the mask; where all survive, the random numbers.
#include "ops/grin_route/cpu/kernels.h"
#include "ops/grin_route/cpu/sampling.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using grin_route::ForwardParams;

// Lanes that hold a token that counts.
template <class A>
FASTLM_INLINE typename Lane<A>::I live_lanes(const ForwardParams& p, int64_t token, int64_t count) {
  typename Lane<A>::Int lane[Lane<A>::kCount] = {};
  for (int64_t i = 0; i < count; ++i) {
    lane[i] = p.valid == nullptr || p.valid[(token + i) * p.valid_stride] ? -1 : 0;
  }
  typename Lane<A>::I mask;
  __builtin_memcpy(&mask, lane, sizeof(mask));
  return mask;
}

template <class A>
struct Picked {
  typename Lane<A>::I expert;
  typename Lane<A>::V prob;    // p[expert]
  typename Lane<A>::V weight;  // m * p[expert]
};

template <class A>
FASTLM_INLINE Picked<A> pick_one(const ForwardParams& p, const Block<A>& block, typename Lane<A>::I live, Sampler<A>& sampler) {
  using V = typename Lane<A>::V;
  using I = typename Lane<A>::I;
  const Top<A> top(block, p.num_experts);
  const V scale = broadcast<V>(static_cast<A>(p.estimator.scale));
  const A threshold = static_cast<A>(p.threshold);

  // The mask, the softmax's sum and the largest perturbed logit among the experts beside the largest logit.
  V sum = top.unit;
  V best = broadcast<V>(-static_cast<A>(__builtin_inf()));
  I best_index = top.index;
  V best_gap = zero<V>();
  bool alone = true;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const I kept = survives(block, top, threshold, e) & live;
    if (!any(kept)) continue;
    alone = false;
    const V gap = scale * (block.logits[e] - top.logit);
    sum += kept ? exp(gap) : zero<V>();
    if (!p.training) continue;
    const V score = gap + gumbel(sampler.number(e));
    const I better = kept & (score > best);
    best = better ? score : best;
    best_index = better ? broadcast_index<A>(e) : best_index;
    best_gap = better ? gap : best_gap;
  }
  if (alone) return {top.index, top.unit, top.unit};
  if (!p.training) return {top.index, top.unit / sum, top.unit / sum};

  // Not `score < best`: a largest logit that is NaN or infinite is picked.
  const V score = gumbel(sampler.number(top.index));
  const I other = (best > score) | ((best == score) & (best_index < top.index));
  if (!any(other)) return {top.index, top.unit / sum, top.unit / sum};
  const V prob = (other ? exp(best_gap) : top.unit) / sum;
  const I whole = ~other | (sampler.number(p.num_experts) < static_cast<A>(p.estimator.keep_one));
  return {other ? best_index : top.index, prob, whole ? prob : prob * static_cast<A>(p.estimator.reduced)};
}

template <class A>
FASTLM_INLINE void write_picks(const ForwardParams& p, Block<A>& block, const Picked<A>& picked, typename Lane<A>::I live,
                               int64_t token, int64_t count, int64_t pick, int32_t* counts) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = (token + i) * p.top_k + pick;
    const bool counted = live[i] != 0;
    const auto expert = static_cast<int32_t>(picked.expert[i]);
    p.ids[to] = counted ? expert : -1;
    static_cast<A*>(p.weights)[to] = counted ? picked.weight[i] : A(0);
    static_cast<A*>(p.probs)[to] = counted ? picked.prob[i] : A(0);
    counts[expert] += counted ? 1 : 0;
    block.mark_picked(expert, i);
  }
}

template <class T>
void forward(const ForwardParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using L = Lane<A>;
  const int64_t rows = padded(p.num_experts, L::kCount);
  const auto vectors = static_cast<size_t>(2 * rows) * kVectorBytes;
  auto* memory = static_cast<char*>(thread_scratch(vectors + static_cast<size_t>(p.num_experts) * sizeof(int32_t)));
  if (memory == nullptr) return;
  Block<A> block{reinterpret_cast<typename L::V*>(memory), reinterpret_cast<typename L::I*>(memory) + rows};
  auto* counts = reinterpret_cast<int32_t*>(memory + vectors);
  for (int64_t e = 0; e < p.num_experts; ++e) counts[e] = 0;

  for (int64_t token = begin; token < end; token += L::kCount) {
    const int64_t count = min_of(L::kCount, end - token);
    const auto live = live_lanes<A>(p, token, count);
    load_block<T>(p, token, count, block);
    for (int64_t pick = 0; pick < p.top_k; ++pick) {
      Sampler<A> sampler{p, token, count, pick};
      write_picks<A>(p, block, pick_one<A>(p, block, live, sampler), live, token, count, pick, counts);
    }
  }
  for (int64_t e = 0; e < p.num_experts; ++e) __atomic_fetch_add(p.counts + e, counts[e], __ATOMIC_RELAXED);
}

}  // namespace

extern const grin_route::ForwardKernels grin_route_forward;
const grin_route::ForwardKernels grin_route_forward = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
