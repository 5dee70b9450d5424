// GRIN's router, backward: dz += c G_j p_j[D_j] (onehot(D_j) - p_j) for every pick j, with p_j computed again from the logits and
// the earlier picks, so that no (T, k, E) tensor is kept. c is the estimator's factor; how the forward pass reduced a weight does
// not enter, since that only moved the point at which G was taken.
// Source: Liu et al., arXiv 2409.12136, section 2.2 and appendix A.
#include "ops/grin_route/cpu/block.h"
#include "ops/grin_route/cpu/kernels.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using grin_route::BackwardParams;

// What came with one pick of each token.
template <class A>
struct Upstream {
  typename Lane<A>::I expert;  // -1: none, and its gradient is not read
  typename Lane<A>::V gradient;

  FASTLM_INLINE Upstream(const BackwardParams& p, int64_t token, int64_t count, int64_t pick) {
    typename Lane<A>::Int id[Lane<A>::kCount];
    A g[Lane<A>::kCount] = {};
    for (int64_t i = 0; i < Lane<A>::kCount; ++i) id[i] = -1;
    for (int64_t i = 0; i < count; ++i) {
      id[i] = p.ids[(token + i) * p.ids_token_stride + pick * p.ids_pick_stride];
      if (id[i] < 0) continue;
      g[i] = static_cast<const A*>(p.dweights)[(token + i) * p.dweights_token_stride + pick * p.dweights_pick_stride];
    }
    __builtin_memcpy(&expert, id, sizeof(expert));
    gradient = load(g);
  }
};

// terms: room for one vector per expert.
template <class A>
FASTLM_INLINE void add_pick(const BackwardParams& p, const Block<A>& block, const Upstream<A>& up, typename Lane<A>::V* terms,
                            typename Lane<A>::V* sums) {
  using V = typename Lane<A>::V;
  using I = typename Lane<A>::I;
  const I live = up.expert >= 0;
  const Top<A> top(block, p.num_experts);
  const V scale = broadcast<V>(static_cast<A>(p.estimator.scale));
  const A threshold = static_cast<A>(p.threshold);
  V sum = top.unit;
  bool alone = true;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const I kept = survives(block, top, threshold, e) & live;
    terms[e] = zero<V>();
    if (!any(kept)) continue;
    alone = false;
    terms[e] = kept ? exp(scale * (block.logits[e] - top.logit)) : zero<V>();
    sum += terms[e];
  }
  // A single survivor has p = 1 and gradient 0, unless something is not finite.
  const V one = (up.gradient - up.gradient) + top.unit;
  if (alone && !any(live & (one != A(1)))) return;

  const V inverse = A(1) / sum;
  for (int64_t i = 0; i < Lane<A>::kCount; ++i) reinterpret_cast<A*>(terms + top.index[i])[i] = top.unit[i];
  A prob[Lane<A>::kCount];
  for (int64_t i = 0; i < Lane<A>::kCount; ++i) prob[i] = up.expert[i] < 0 ? A(0) : terms[up.expert[i]][i];
  const V factor = static_cast<A>(p.estimator.gradient) * up.gradient * (load(prob) * inverse);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const V chosen = up.expert == broadcast_index<A>(e) ? broadcast<V>(1) : zero<V>();
    const V add = factor * (chosen - terms[e] * inverse);
    sums[e] += live ? add : zero<V>();
  }
}

template <class T>
void write_block(const BackwardParams& p, const typename Lane<acc_t<T>>::V* sums, int64_t token, int64_t count) {
  using V = typename Lane<acc_t<T>>::V;
  constexpr int64_t kLanes = Lane<acc_t<T>>::kCount;
  T* to = static_cast<T*>(p.dlogits) + token * p.num_experts;
  for (int64_t e = 0; e < p.num_experts; e += kLanes) {
    V square[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) square[i] = sums[e + i];
    transpose(square);
    for (int64_t i = 0; i < count; ++i) store_upto(to + i * p.num_experts + e, square[i], p.num_experts - e);
  }
}

template <class T>
void backward(const BackwardParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using L = Lane<A>;
  const int64_t rows = padded(p.num_experts, L::kCount);
  auto* memory = static_cast<typename L::V*>(thread_scratch(static_cast<size_t>(4 * rows) * kVectorBytes));
  if (memory == nullptr) return;
  Block<A> block{memory, reinterpret_cast<typename L::I*>(memory + rows)};
  typename L::V* terms = memory + 2 * rows;
  typename L::V* sums = memory + 3 * rows;

  for (int64_t token = begin; token < end; token += L::kCount) {
    const int64_t count = min_of(L::kCount, end - token);
    load_block<T>(p, token, count, block);
    for (int64_t e = 0; e < rows; ++e) sums[e] = zero<typename L::V>();
    for (int64_t pick = 0; pick < p.top_k; ++pick) {
      const Upstream<A> up(p, token, count, pick);
      add_pick<A>(p, block, up, terms, sums);
      for (int64_t i = 0; i < count; ++i) {
        if (up.expert[i] >= 0) block.mark_picked(up.expert[i], i);
      }
    }
    write_block<T>(p, sums, token, count);
  }
}

}  // namespace

extern const grin_route::BackwardKernels grin_route_backward;
const grin_route::BackwardKernels grin_route_backward = {
    {backward<float>, backward<bfloat16>, backward<float16>, backward<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
