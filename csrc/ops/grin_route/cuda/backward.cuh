// GRIN's router on CUDA, backward (see ../cpu/backward.cpp): dz += c G_j p_j[D_j] (onehot(D_j) - p_j) for every pick j, with p_j
// computed again from the logits and the earlier picks.
#pragma once

#include "ops/grin_route/cuda/row.cuh"

namespace fastlm::grin_route::cuda {

// One pick of a token: dz[e] of it is factor * ((e == expert) - term[e] * inverse), term = e^(z - top) of the experts that p is
// over.
template <class A>
struct PickGradient {
  Top<A> top;
  int expert;  // -1: none
  A factor, inverse;

  // Where nothing of it can be other than 0: without a pick, or with a single survivor and only finite numbers.
  __device__ __forceinline__ bool is_zero() const { return expert < 0; }
};

template <class A>
__device__ __forceinline__ A term_of(A logit, int expert, bool kept, const Top<A>& top, A scale) {
  if (expert == top.expert) return top.unit;
  return kept ? exponential(scale * (logit - top.logit)) : A(0);
}

// terms: of the experts in registers.
template <class T, int kLanes, int kPieces>
__device__ __forceinline__ PickGradient<acc_t<T>> pick_gradient(const BackwardParams& p, const Row<T, kLanes, kPieces>& row,
                                                                const Group<kLanes>& group, int64_t token, int id, int pick,
                                                                acc_t<T>* terms) {
  using A = acc_t<T>;
  const A threshold = static_cast<A>(p.threshold);
  const A scale = static_cast<A>(p.estimator.scale);
  PickGradient<A> gradient{find_top(row, group), -1, A(0), A(0)};
  const Top<A>& top = gradient.top;
  A upstream = A(0);
  if (id >= 0) upstream = static_cast<const A*>(p.dweights)[token * p.dweights_token_stride + pick * p.dweights_pick_stride];
  const uint32_t kept = id >= 0 ? all_survivors(row, top, threshold) : 0;
  const bool not_finite = id >= 0 && (upstream - upstream) + top.unit != A(1);
  const uint32_t ballot = __ballot_sync(kFullWarp, kept != 0 || not_finite);
  if (ballot == 0) return gradient;

  A sum = A(0), chosen = A(0);
  row.visit([&](int piece, int first, const Quad<A>& quad) {
    const uint32_t wanted = survivors_of<kPieces>(kept, piece, quad, first, top, threshold);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const A term = term_of(quad.logit[i], first + i, (wanted >> i & 1u) != 0, top, scale);
      sum += term;
      chosen = first + i == id ? term : chosen;
      if constexpr (kPieces > 0) terms[piece * kQuad + i] = term;
    }
  });
  sum = group.sum(sum);
  chosen = group.from_owner(chosen, id < 0 ? 0 : id);
  if (!group.any(ballot)) return gradient;
  gradient.expert = id;
  gradient.inverse = quotient(A(1), sum);
  gradient.factor = static_cast<A>(p.estimator.gradient) * upstream * (chosen * gradient.inverse);
  return gradient;
}

template <class A>
__device__ __forceinline__ A add_gradient(const PickGradient<A>& gradient, int expert, A term, A to) {
  const A one = gradient.expert == expert ? A(1) : A(0);
  return gradient.is_zero() ? to : to + gradient.factor * (one - term * gradient.inverse);
}

// Four gradients of a contiguous row, of which those at and beyond `experts` do not exist.
template <class T, class A>
__device__ __forceinline__ void store_quad(T* row, int first, int64_t experts, const A (&sum)[kQuad]) {
  if constexpr (sizeof(T) < 8) {
    if (experts % kQuad == 0) {
      if (first >= experts) return;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(row + first) = float4{sum[0], sum[1], sum[2], sum[3]};
      } else {
        using fastlm::cuda::pack_pair;
        *reinterpret_cast<uint2*>(row + first) = uint2{pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3])};
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (first + i < experts) row[first + i] = from_acc<T>(sum[i]);
  }
}

template <class T, int kLanes, int kPieces>
__global__ void __launch_bounds__(kThreads) route_gradient(const BackwardParams p, bool whole) {
  using A = acc_t<T>;
  constexpr int kTokens = kThreads / kLanes;
  const Group<kLanes> group;
  const int top_k = static_cast<int>(p.top_k);
  const A scale = static_cast<A>(p.estimator.scale);
  const A threshold = static_cast<A>(p.threshold);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kTokens; base < p.num_tokens;
       base += static_cast<int64_t>(gridDim.x) * kTokens) {
    const int64_t token = base + threadIdx.x / kLanes;
    const bool exists = token < p.num_tokens;
    const auto id_of = [&](int pick) {
      const int id = exists ? p.ids[token * p.ids_token_stride + pick * p.ids_pick_stride] : -1;
      return id < p.num_experts ? id : -1;
    };
    Row<T, kLanes, kPieces> row(p, token, exists, whole, group.lane);
    T* to = static_cast<T*>(p.dlogits) + token * p.num_experts;
    if constexpr (kPieces > 0) {
      A sums[kPieces][kQuad] = {};
      for (int pick = 0; pick < top_k; ++pick) {
        const int id = id_of(pick);
        A terms[kPieces * kQuad] = {};
        const PickGradient<A> gradient = pick_gradient(p, row, group, token, id, pick, terms);
#pragma unroll
        for (int i = 0; i < kPieces * kQuad; ++i) {
          A& sum = sums[i / kQuad][i % kQuad];
          sum = add_gradient(gradient, row.first(i / kQuad) + i % kQuad, terms[i], sum);
        }
        if (id >= 0) row.mark_picked(id);
      }
      if (!exists) continue;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) store_quad(to, row.first(i), p.num_experts, sums[i]);
    } else {
      // No room for a sum of each expert: all picks first, then each expert with all of them.
      PickGradient<A> gradients[kMaxPicks];
      for (int pick = 0; pick < top_k; ++pick) {
        const int id = id_of(pick);
        gradients[pick] = pick_gradient(p, row, group, token, id, pick, static_cast<A*>(nullptr));
        if (id >= 0) row.mark_picked(id);
      }
      if (!exists) continue;
      row.visit_at(0, [&](int, int first, Quad<A>& quad) {
        A sum[kQuad] = {};
        for (int pick = 0; pick < top_k; ++pick) {
          const PickGradient<A>& gradient = gradients[pick];
          const uint32_t kept = gradient.is_zero() ? 0 : survivors(quad, first, gradient.top, threshold);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const A term = term_of(quad.logit[i], first + i, (kept >> i & 1u) != 0, gradient.top, scale);
            sum[i] = add_gradient(gradient, first + i, term, sum[i]);
          }
          if (id_of(pick) >= 0) quad.mark_picked(id_of(pick) - first);
        }
        store_quad(to, first, p.num_experts, sum);
      });
    }
  }
}

}  // namespace fastlm::grin_route::cuda
