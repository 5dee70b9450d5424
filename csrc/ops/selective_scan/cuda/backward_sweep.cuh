// The backward scan on CUDA, second part: sweeps over a few positions, forward onto a tape in registers and back from it.
#pragma once

#include "ops/selective_scan/cuda/backward_tile.cuh"

namespace fastlm::selective_scan::cuda {

template <class A>
__device__ __forceinline__ void load_four(A (&to)[4], const A* from) {
  if constexpr (sizeof(A) == 4) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    const double2 x = *reinterpret_cast<const double2*>(from), y = *reinterpret_cast<const double2*>(from + 2);
    to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
  }
}
template <class A>
__device__ __forceinline__ void store_four(A* to, const A (&x)[4]) {
  if constexpr (sizeof(A) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *reinterpret_cast<double2*>(to) = make_double2(x[0], x[1]);
    *reinterpret_cast<double2*>(to + 2) = make_double2(x[2], x[3]);
  }
}

// The states of one lane and what is summed for them.
template <class Shape>
struct Lane {
  using A = typename Shape::A;
  static constexpr int kPer = Shape::kPer, kSub = Shape::kSub, kChannels = Shape::kChannels, kStates = Shape::kStates;
  int channel, lane;            // in the block; of the channel's lanes
  const A *pairs, *B, *C, *dy;  // of this lane's channel and states
  A* terms;                     // of this lane's warp
  A *write[2], *read[2];        // this lane's places among them
  A* sums;                      // of this lane
  A decay[kPer];                // A log2(e)
  A carry[kPer];                // gradient of the state before the position after those at hand: a lambda
  A dA[kPer];
  A b_constant[kPer], c_constant[kPer], dB[kPer], dC[kPer];  // unless kPlain

  __device__ __forceinline__ void load_b(const BackwardCall& call, int t, A (&b)[kPer]) const {
    load_four(b, B + t * kStates);
    if constexpr (!Shape::kPlain) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) b[i] = call.p.B.constant ? b_constant[i] : b[i];
    }
  }
  __device__ __forceinline__ void load_c(const BackwardCall& call, int t, A (&c)[kPer]) const {
    load_four(c, C + t * kStates);
    if constexpr (!Shape::kPlain) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) c[i] = call.p.C.constant ? c_constant[i] : c[i];
    }
  }

  // The states at positions 0, 8, ... of a chunk, which begins with h.
  __device__ __forceinline__ void keep_states(const BackwardCall& call, int subs, A (&h)[kPer], A* kept) const {
    store_four(kept, h);
#pragma unroll 1
    for (int sub = 1; sub < subs; ++sub) {
#pragma unroll
      for (int j = 0; j < kSub; ++j) {
        const int t = (sub - 1) * kSub + j;
        const A dt = pairs[t * kChannels * 2], dtu = pairs[t * kChannels * 2 + 1];
        A b[kPer];
        load_b(call, t, b);
#pragma unroll
        for (int i = 0; i < kPer; ++i) h[i] = fastlm::cuda::multiply_add(power_of_two(dt * decay[i]), h[i], dtu * b[i]);
      }
      store_four(kept + sub * Shape::kThreads * kPer, h);
    }
  }

  // Terms lie as [position][channel of the warp][state], channels of odd positions exchanged in pairs: so readers of two
  // positions meet different banks.
  __device__ __forceinline__ void place_terms(A* warp_terms) {
    const int own = channel % 8, column = lane * kPer;
    terms = warp_terms;
    write[0] = warp_terms + own * kStates + column;
    write[1] = warp_terms + (own ^ 1) * kStates + column;
    read[0] = warp_terms + (own * 8 + (own & 1)) * kStates + column;  // `own` is the position here
    read[1] = warp_terms + (own * 8 + ((own & 1) ^ 1)) * kStates + column;
  }
  __device__ __forceinline__ A* term(int j) const { return write[j & 1] + j * 8 * kStates; }
  // Sums over the channels of the warp: lane l of the warp gets four states of position l / 4.
  __device__ __forceinline__ void sum_terms(A (&sum)[4]) const {
    __syncwarp();
    load_four(sum, read[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      A x[4];
      load_four(x, read[i & 1] + i / 2 * 2 * kStates);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += x[k];
    }
    __syncwarp();
  }

  // What a sweep reads of a position: one ahead, since the writes between would hold the reads back.
  struct Step {
    A dt, dtu, grad, b[kPer], c[kPer];
  };
  __device__ __forceinline__ void read_step(const BackwardCall& call, int t0, int j, Step& s) const {
    s.dt = pairs[(t0 + j) * kChannels * 2];
    s.dtu = pairs[(t0 + j) * kChannels * 2 + 1];
    s.grad = dy[j * kChannels];
    load_b(call, t0 + j, s.b);
    load_c(call, t0 + j, s.c);
  }

  // Forward from h over a sub-chunk, then back. `t0`: its first position in the chunk. Sums of a lane's states: [3][position]
  // [channel][lane]: y, sum lambda B, sum lambda decay a h.
  __device__ __forceinline__ void sweep(const BackwardCall& call, int t0, A (&h)[kPer], A (&dB_sum)[4], A (&dC_sum)[4]) {
    A a[kSub][kPer], ah[kSub][kPer];  // a_t, a_t h_{t-1}
    Step next;
    read_step(call, t0, 0, next);
#pragma unroll
    for (int j = 0; j < kSub; ++j) {
      const Step s = next;
      if (j + 1 < kSub) read_step(call, t0, j + 1, next);
      A y = A(0), term_c[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        a[j][i] = power_of_two(s.dt * decay[i]);
        ah[j][i] = a[j][i] * h[i];
        h[i] = fastlm::cuda::multiply_add(s.dtu, s.b[i], ah[j][i]);
        y = fastlm::cuda::multiply_add(s.c[i], h[i], y);
        term_c[i] = s.grad * h[i];
        if constexpr (!Shape::kPlain) dC[i] += term_c[i];
      }
      store_four(term(j), term_c);
      sums[j * Shape::kThreads] = y;
    }
    read_step(call, t0, kSub - 1, next);
    sum_terms(dC_sum);
#pragma unroll
    for (int j = kSub - 1; j >= 0; --j) {
      const Step s = next;
      if (j > 0) read_step(call, t0, j - 1, next);
      A sum_b = A(0), sum_decay = A(0), term_b[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const A lambda = fastlm::cuda::multiply_add(s.c[i], s.grad, carry[i]);
        carry[i] = a[j][i] * lambda;
        sum_b = fastlm::cuda::multiply_add(lambda, s.b[i], sum_b);
        const A w = lambda * ah[j][i];
        sum_decay = fastlm::cuda::multiply_add(decay[i], w, sum_decay);
        dA[i] = fastlm::cuda::multiply_add(s.dt, w, dA[i]);
        term_b[i] = lambda * s.dtu;
        if constexpr (!Shape::kPlain) dB[i] += term_b[i];
      }
      store_four(term(j), term_b);
      sums[(kSub + j) * Shape::kThreads] = sum_b;
      sums[(2 * kSub + j) * Shape::kThreads] = sum_decay;
    }
    sum_terms(dB_sum);
  }
};

}  // namespace fastlm::selective_scan::cuda
