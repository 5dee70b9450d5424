// The forward scan on CUDA: what a lane's states start from, and where they are kept.
#pragma once

#include "ops/selective_scan/cuda/forward_stage.cuh"
#include "ops/selective_scan/cuda/functions.cuh"

namespace fastlm::selective_scan::cuda {

// Factors of the exponents, and the states before the stretch (kEnds: zeros).
template <class Shape, bool kEnds>
__device__ __forceinline__ void first_states(const ForwardCall& call, const Stretch& s, int channel, int lane,
                                             typename Shape::A (&decay)[Shape::kPer], typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  const int64_t d = s.channel + channel;
#pragma unroll
  for (int i = 0; i < Shape::kPer; ++i) {
    const int64_t n = lane * Shape::kPer + i;
    const bool there = channel < s.channels && n < p.state;
    // Rounded once: the error is that of every exponent of the channel.
    decay[i] = there ? static_cast<A>(kLog2e * fastlm::cuda::load_param<double>(p.A.data, p.A.dtype,
                                                                                d * p.A.dim_stride + n * p.A.state_stride))
                     : A(0);
    h[i] = A(0);
    if constexpr (!kEnds) {
      if (there && call.split.begin_states != nullptr) {
        h[i] = static_cast<const A*>(call.split.begin_states)[(s.slot * p.state + n) * p.dim + d];
      } else if (there && p.initial_state != nullptr) {
        h[i] = fastlm::cuda::load_param<A>(
            p.initial_state, p.initial_dtype,
            s.number * p.initial_batch_stride + d * p.initial_dim_stride + n * p.initial_state_stride);
      }
    }
  }
}

// The states before position `end`, for the backward pass where a chunk ends there.
template <class Shape>
__device__ __forceinline__ void keep_chunk(const ForwardCall& call, const Stretch& s, int64_t end, int channel, int lane,
                                           const typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  const int64_t done = end - s.sequence.begin;
  if (done % kChunk != 0 || channel >= s.channels) return;
  A* chunk =
      static_cast<A*>(p.chunk_states) + (s.sequence.chunk_begin + done / kChunk - 1) * p.state * p.dim + s.channel + channel;
#pragma unroll
  for (int i = 0; i < Shape::kPer; ++i) {
    if (lane * Shape::kPer + i < p.state) chunk[(lane * Shape::kPer + i) * p.dim] = h[i];
  }
}

// The same for every kChunk positions from the start of a stretch on, by a pointer that moves along.
template <class Shape>
struct ChunkStates {
  using A = typename Shape::A;
  A* next;
  int count;  // of the lane's states

  __device__ __forceinline__ ChunkStates(const ForwardCall& call, const Stretch& s, int channel, int lane) {
    const ForwardParams& p = call.p;
    const int64_t first = lane * Shape::kPer;
    next = static_cast<A*>(p.chunk_states) +
           ((s.sequence.chunk_begin + (s.begin - s.sequence.begin) / kChunk) * p.state + first) * p.dim + s.channel + channel;
    count = channel < s.channels ? static_cast<int>(max_of(0, min_of(Shape::kPer, p.state - first))) : 0;
  }
  __device__ __forceinline__ void keep(const ForwardCall& call, const A (&h)[Shape::kPer]) {
    const ForwardParams& p = call.p;
#pragma unroll
    for (int i = 0; i < Shape::kPer; ++i) {
      if (i < count) next[i * p.dim] = h[i];
    }
    next += p.state * p.dim;
  }
};

// The states after the stretch, where it is the last of its sequence.
template <class Shape>
__device__ __forceinline__ void last_states(const ForwardCall& call, const Stretch& s, int channel, int lane,
                                            const typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  if (channel >= s.channels || s.end != s.sequence.end) return;
#pragma unroll
  for (int i = 0; i < Shape::kPer; ++i) {
    const int64_t n = lane * Shape::kPer + i;
    if (n < p.state) static_cast<A*>(p.last_state)[(s.number * p.dim + s.channel + channel) * p.state + n] = h[i];
  }
}

// The same of a part whose first state was 0, and the product of its decays; total: of its step sizes.
template <class Shape>
__device__ __forceinline__ void part_states(const ForwardCall& call, const Stretch& s, int channel, int lane,
                                            const typename Shape::A (&decay)[Shape::kPer], typename Shape::A total,
                                            const typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  if (channel >= s.channels) return;
#pragma unroll
  for (int i = 0; i < Shape::kPer; ++i) {
    const int64_t n = lane * Shape::kPer + i;
    if (n >= p.state) continue;
    const int64_t at = (s.slot * p.state + n) * p.dim + s.channel + channel;
    static_cast<A*>(call.split.end_states)[at] = h[i];
    static_cast<A*>(call.split.decays)[at] = power_of_two(decay[i] * total);
  }
}

}  // namespace fastlm::selective_scan::cuda
