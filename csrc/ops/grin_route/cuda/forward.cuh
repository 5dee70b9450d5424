// GRIN's router on CUDA, forward (see ../cpu/forward.cpp). A group of lanes has a token: the comparisons that find the largest
// logit and the divisions of the mask are spread over it. Where no token of a warp has a second survivor, as is usual, the warp
// computes no exponential and no random number.
#pragma once

#include "ops/grin_route/cuda/row.cuh"
#include "ops/grin_route/cuda/sampling.cuh"

namespace fastlm::grin_route::cuda {

template <class A>
struct Picked {
  int expert;
  A prob;    // p[expert]
  A weight;  // m * p[expert]
};

template <class T, int kLanes, int kPieces>
__device__ __forceinline__ Picked<acc_t<T>> pick_one(const ForwardCall& call, const Row<T, kLanes, kPieces>& row,
                                                     const Group<kLanes>& group, const Sampler<acc_t<T>>& sampler, bool live) {
  using A = acc_t<T>;
  const Top<A> top = find_top(row, group);
  const A threshold = static_cast<A>(call.threshold);
  const uint32_t kept = live ? all_survivors(row, top, threshold) : 0;
  const uint32_t ballot = __ballot_sync(kFullWarp, kept != 0);
  if (ballot == 0) return {top.expert, top.unit, top.unit};

  // The softmax's sum and the largest perturbed logit, the largest logit itself among them: its noise is finite, so that it wins
  // where another's sum is not a number.
  const bool some = group.any(ballot);
  const A scale = static_cast<A>(call.estimator.scale);
  A sum = A(0);
  A best = -std::numeric_limits<A>::infinity();
  int expert = top.expert;
  A term = A(0);  // e^(z - top) of the best
  row.visit([&](int piece, int first, const Quad<A>& quad) {
    const auto place = static_cast<uint32_t>(top.expert - first);
    uint32_t wanted = survivors_of<kPieces>(kept, piece, quad, first, top, threshold);
    if (some && place < kQuad) wanted |= 1u << place;
    if (wanted == 0) return;
    A u[kQuad];
    if (call.training) sampler.quad(first, wanted, u);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if ((wanted >> i & 1u) == 0) continue;
      const bool is_top = place == static_cast<uint32_t>(i);
      const A gap = is_top ? A(0) : scale * (quad.logit[i] - top.logit);
      const A own = is_top ? top.unit : exponential(gap);
      sum += own;
      const A score = call.training ? gap + gumbel(u[i]) : A(0);
      const bool better = call.training ? score > best : is_top;
      best = better ? score : best;
      expert = better ? first + i : expert;
      term = better ? own : term;
    }
  });
  sum = group.sum(sum);
  if (call.training) group.largest(best, expert);
  term = group.from_owner(term, expert);
  if (!some) return {top.expert, top.unit, top.unit};
  const A prob = quotient(term, sum);
  const bool whole =
      expert == top.expert || sampler.one(static_cast<int>(call.num_experts)) < static_cast<A>(call.estimator.keep_one);
  return {expert, prob, whole ? prob : prob * static_cast<A>(call.estimator.reduced)};
}

// Shared: an int32 for each expert where `fits`.
template <class T, int kLanes, int kPieces>
__global__ void __launch_bounds__(kThreads) route(const ForwardCall call, bool whole, bool fits) {
  using A = acc_t<T>;
  constexpr int kTokens = kThreads / kLanes;
  const bool count_here = kPieces > 0 || fits;
  auto* counts = count_here ? reinterpret_cast<int32_t*>(fastlm::cuda::shared_memory()) : call.counts;
  if (count_here) {
    for (int e = static_cast<int>(threadIdx.x); e < call.num_experts; e += kThreads) counts[e] = 0;
    __syncthreads();
  }
  const uint64_t seed = call.device_seed == nullptr ? 0 : static_cast<uint64_t>(__ldg(call.device_seed));
  const Group<kLanes> group;
  const int top_k = static_cast<int>(call.top_k);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kTokens; base < call.num_tokens;
       base += static_cast<int64_t>(gridDim.x) * kTokens) {
    const int64_t token = base + threadIdx.x / kLanes;
    const bool exists = token < call.num_tokens;
    const bool live = exists && (call.valid == nullptr || call.valid[token * call.valid_stride]);
    Row<T, kLanes, kPieces> row(call, token, live, whole, group.lane);
    Picked<A> held{};
    for (int pick = 0; pick < top_k; ++pick) {
      const Sampler<A> sampler{call, seed, token, pick};
      const Picked<A> picked = pick_one(call, row, group, sampler, live);
      row.mark_picked(picked.expert);
      // Each lane keeps one pick, so that a token's results are written side by side.
      const int place = pick % kLanes;
      if (group.lane == place) held = picked;
      if ((place != kLanes - 1 && pick != top_k - 1) || group.lane > place || !exists) continue;
      const int64_t to = token * top_k + pick - place + group.lane;
      call.ids[to] = live ? held.expert : -1;
      static_cast<A*>(call.weights)[to] = live ? held.weight : A(0);
      static_cast<A*>(call.probs)[to] = live ? held.prob : A(0);
      if (live) atomicAdd(&counts[held.expert], 1);
    }
  }
  if (!count_here) return;
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < call.num_experts; e += kThreads) {
    if (counts[e] != 0) atomicAdd(&call.counts[e], counts[e]);
  }
}

}  // namespace fastlm::grin_route::cuda
