// One token's logits, spread over a group of lanes, and what both passes take from them: the largest that is left and the mask.
// Ranks and quotients are those of ../cpu/block.h, bit for bit.
#pragma once

#include <bit>
#include <limits>
#include <type_traits>

#include "core/cuda/device.cuh"
#include "ops/grin_route/cuda/forms.h"

namespace fastlm::grin_route::cuda {

using fastlm::cuda::from_acc;
using fastlm::cuda::kFullWarp;
using fastlm::cuda::to_acc;

template <class A>
using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
constexpr Int<A> kPicked = std::numeric_limits<Int<A>>::min();  // below the rank of -infinity
template <class A>
constexpr Int<A> kNan = std::numeric_limits<Int<A>>::max();  // above that of infinity, and NaN when turned back

template <class A>
__device__ __forceinline__ Int<A> rank_of(A x) {
  const auto bits = std::bit_cast<Int<A>>(x + A(0));  // -0 becomes +0
  return x == x ? bits ^ ((bits >> (8 * sizeof(A) - 1)) & kNan<A>) : kNan<A>;
}
template <class A>
__device__ __forceinline__ A logit_of(Int<A> rank) {
  return std::bit_cast<A>(rank ^ ((rank >> (8 * sizeof(A) - 1)) & kNan<A>));
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The lanes of one token. All lanes of a warp take part in every exchange.
template <int kLanes>
struct Group {
  int lane = static_cast<int>(threadIdx.x) % kLanes;

  __device__ __forceinline__ bool any(uint32_t ballot) const {
    constexpr uint32_t kAll = kLanes == 32 ? kFullWarp : (1u << (kLanes % 32)) - 1;
    return (ballot >> (threadIdx.x % 32 / kLanes * kLanes) & kAll) != 0;
  }
  template <class A>
  __device__ __forceinline__ A sum(A x) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
  }
  // The pair with the larger key, or of equal keys with the smaller expert. A key that is NaN loses.
  template <class K>
  __device__ __forceinline__ void largest(K& key, int& expert) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const K other_key = __shfl_xor_sync(kFullWarp, key, distance);
      const int other = __shfl_xor_sync(kFullWarp, expert, distance);
      const bool better = other_key > key || (other_key == key && other < expert);
      key = better ? other_key : key;
      expert = better ? other : expert;
    }
  }
  // What the lane that holds this expert has.
  template <class A>
  __device__ __forceinline__ A from_owner(A x, int expert) const {
    return __shfl_sync(kFullWarp, x, expert / kQuad % kLanes, kLanes);
  }
};

template <class A>
struct Quad {
  A logit[kQuad];
  Int<A> rank[kQuad];

  // Experts from `first`; nothing is read where `live` is false.
  template <class T>
  __device__ __forceinline__ void load(const Params& p, const T* row, int first, bool live, bool whole) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) logit[i] = A(0);
    if (whole) {
      if (live && first < p.num_experts) load_whole(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (live && first + i < p.num_experts) logit[i] = to_acc(row[(first + i) * p.logits_expert_stride]);
      }
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) rank[i] = first + i < p.num_experts ? rank_of(logit[i]) : kPicked<A>;
  }
  __device__ __forceinline__ void mark_picked(int place) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) rank[i] = place == i ? kPicked<A> : rank[i];
  }

 private:
  __device__ __forceinline__ void load_whole(const float* from) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    logit[0] = __uint_as_float(v.x), logit[1] = __uint_as_float(v.y);
    logit[2] = __uint_as_float(v.z), logit[3] = __uint_as_float(v.w);
  }
  __device__ __forceinline__ void load_whole(const double* from) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) logit[i] = from[i];
  }
  template <class T>
  __device__ __forceinline__ void load_whole(const T* from) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    logit[0] = to_acc(T{static_cast<uint16_t>(v.x)}), logit[1] = to_acc(T{static_cast<uint16_t>(v.x >> 16)});
    logit[2] = to_acc(T{static_cast<uint16_t>(v.y)}), logit[3] = to_acc(T{static_cast<uint16_t>(v.y >> 16)});
  }
};

// A lane's share of a row. visit calls f(piece, first expert, quad) for each four of experts.
template <class T, int kLanes, int kPieces>
struct Row {
  using A = acc_t<T>;
  int lane;
  Quad<A> quad[kPieces];

  __device__ __forceinline__ Row(const Params& p, int64_t token, bool live, bool whole, int lane_of_group) : lane(lane_of_group) {
    const T* row = static_cast<const T*>(p.logits) + (live ? token : 0) * p.logits_token_stride;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) quad[i].load(p, row, first(i), live, whole);
  }
  __device__ __forceinline__ int first(int piece) const { return (piece * kLanes + lane) * kQuad; }
  template <class F>
  __device__ __forceinline__ void visit(F f) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) f(i, first(i), quad[i]);
  }
  __device__ __forceinline__ void mark_picked(int expert) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) quad[i].mark_picked(expert - first(i));
  }
};

// The same for any number of experts, read again at each visit.
template <class T, int kLanes>
struct Row<T, kLanes, 0> {
  using A = acc_t<T>;
  const Params& p;
  const T* row;
  bool live, whole;
  int lane;
  int num_picked = 0;
  int picked[kMaxPicks] = {-1, -1, -1, -1, -1, -1, -1, -1};

  __device__ __forceinline__ Row(const Params& params, int64_t token, bool is_live, bool whole_quads, int lane_of_group)
      : p(params),
        row(static_cast<const T*>(p.logits) + (is_live ? token : 0) * p.logits_token_stride),
        live(is_live),
        whole(whole_quads),
        lane(lane_of_group) {}
  // As it was when `before` experts were marked.
  template <class F>
  __device__ __forceinline__ void visit_at(int before, F f) const {
    for (int piece = 0; piece * kLanes * kQuad < p.num_experts; ++piece) {
      const int first = (piece * kLanes + lane) * kQuad;
      Quad<A> quad;
      quad.load(p, row, first, live, whole);
#pragma unroll
      for (int j = 0; j < kMaxPicks; ++j) {
        if (j < before) quad.mark_picked(picked[j] - first);
      }
      f(piece, first, quad);
    }
  }
  template <class F>
  __device__ __forceinline__ void visit(F f) const {
    visit_at(num_picked, f);
  }
  __device__ __forceinline__ void mark_picked(int expert) {
#pragma unroll
    for (int j = 0; j < kMaxPicks; ++j) picked[j] = j == num_picked ? expert : picked[j];
    ++num_picked;
  }
};

// The largest remaining logit; the first of several. z - top is 0 for it, or NaN if it is not finite.
template <class A>
struct Top {
  int expert;
  A logit;
  A unit;  // e^(z - top) of the largest itself: 1, or NaN
};

template <class T, int kLanes, int kPieces>
__device__ __forceinline__ Top<acc_t<T>> find_top(const Row<T, kLanes, kPieces>& row, const Group<kLanes>& group) {
  using A = acc_t<T>;
  Int<A> best = kPicked<A>;
  int expert = std::numeric_limits<int>::max();
  row.visit([&](int, int first, const Quad<A>& quad) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const bool better = quad.rank[i] > best;
      best = better ? quad.rank[i] : best;
      expert = better ? first + i : expert;
    }
  });
  group.largest(best, expert);
  const A logit = logit_of<A>(best);
  return {expert, logit, (logit - logit) + A(1)};
}

__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// Which of four experts survive the mask beside the largest, as bits. NaN keeps: 0 / 0 where all are 0, inf / inf.
template <class A>
__device__ __forceinline__ uint32_t survivors(const Quad<A>& quad, int first, const Top<A>& top, A threshold) {
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    // 1 / 1 for those not asked about: a numerator of 0, which the largest has, would take the division's slow path.
    const bool other = quad.rank[i] != kPicked<A> && first + i != top.expert;
    const A size = quad.logit[i] < A(0) ? -quad.logit[i] : quad.logit[i];
    const A gap = other ? top.logit - quad.logit[i] : A(1);
    const bool dropped = quotient(gap, other ? (size > top.logit ? size : top.logit) : A(1)) > threshold;
    if (other && !dropped) kept |= 1u << i;
  }
  return kept;
}

// The same for a lane's whole share: bits of each piece, or whether there is one where they do not fit.
template <class T, int kLanes, int kPieces>
__device__ __forceinline__ uint32_t all_survivors(const Row<T, kLanes, kPieces>& row, const Top<acc_t<T>>& top,
                                                  acc_t<T> threshold) {
  uint32_t kept = 0;
  row.visit([&](int piece, int first, const auto& quad) {
    kept |= survivors(quad, first, top, threshold) << (kPieces > 0 ? piece * kQuad : 0);
  });
  return kept;
}

// Those of one piece again.
template <int kPieces, class A>
__device__ __forceinline__ uint32_t survivors_of(uint32_t all, int piece, const Quad<A>& quad, int first, const Top<A>& top,
                                                 A threshold) {
  if constexpr (kPieces > 0) return all >> (piece * kQuad) & 15u;
  return all == 0 ? 0 : survivors(quad, first, top, threshold);
}

}  // namespace fastlm::grin_route::cuda
