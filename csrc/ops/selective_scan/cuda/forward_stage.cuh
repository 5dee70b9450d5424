// The forward scan on CUDA, first part: what a team scans, and how the tiles of its inputs come into shared memory.
#pragma once

#include "ops/selective_scan/cuda/forward_call.h"
#include "ops/selective_scan/cuda/sequences.cuh"
#include "ops/selective_scan/cuda/stage.cuh"

namespace fastlm::selective_scan::cuda {

using fastlm::cuda::kFullWarp;
using fastlm::cuda::Team;

template <class T_, int kLanes_, int kPer_, int kSteps_, int kStages_, bool kAhead_ = kPer_ == 4 && sizeof(acc_t<T_>) == 4>
struct ForwardShape {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int kThreads = 128;
  static constexpr int kLanes = kLanes_, kPer = kPer_, kSteps = kSteps_, kStages = kStages_;
  static constexpr int kStates = kLanes * kPer, kChannels = kThreads / kLanes;
  static constexpr bool kAhead = kAhead_;  // takes about 60 registers more
  static_assert(kChunk % kSteps == 0 && kSteps % 4 == 0 && kLanes >= 4);

  // Threads of a warp, from the low bit: one of two channels, lanes of a channel, more channels. Neighbours then read the same B
  // and C, and threads two apart the same step: a wide read of shared memory costs half as many cycles where one of these holds.
  static constexpr int kLaneStride = kLanes < 32 ? 2 : 1;
  static __device__ __forceinline__ int channel_of(int thread) {
    return thread / (kLanes * kLaneStride) * kLaneStride + thread % kLaneStride;
  }
  static __device__ __forceinline__ int lane_of(int thread) { return thread / kLaneStride % kLanes; }

  using Channels = Tile<T, kSteps, kChannels>;
  using States = Tile<T, kSteps, kStates>;
  static constexpr int kRawBytes = 3 * Channels::kBytes + 2 * States::kBytes;  // u, delta, z, B, C
  static constexpr int kSumStride = kChannels + 9;  // writes of 4 steps x 8 channels and reads of columns meet 32 banks
  static constexpr int kStepBytes = kSteps * kChannels * 2 * static_cast<int>(sizeof(A));  // pairs (dt, dt u)
  static constexpr int kMatrixBytes = kSteps * kStates * static_cast<int>(sizeof(A));
  static constexpr int kSumBytes = (kSteps * kSumStride * static_cast<int>(sizeof(A)) + 15) / 16 * 16;
  static constexpr int kParamBytes = 2 * kChannels * static_cast<int>(sizeof(A));  // delta_bias and D
  static constexpr int kPreparedBytes = kStepBytes + 2 * kMatrixBytes;
  static constexpr int kSharedBytes = kStages * kRawBytes + kPreparedBytes + kSumBytes + kParamBytes;

  static __host__ __device__ int64_t blocks_per_group(const Params& p) { return ceil_div(p.dim / p.groups, kChannels); }
  static __host__ __device__ int64_t blocks(const Params& p) { return p.groups * blocks_per_group(p); }
};

// A stretch of one sequence and the channels that a team scans.
struct Stretch {
  Sequence sequence;
  int64_t number;      // of the sequence
  int64_t begin, end;  // positions; begin - sequence.begin is a multiple of kChunk
  int64_t slot;        // row of the states of parts
  int64_t channel;     // first
  int channels;
  int64_t group;
};

template <class Shape>
__device__ __forceinline__ Stretch stretch_of(const ForwardCall& call, int64_t item) {
  const Params& p = call.p;
  const int64_t blocks = Shape::blocks(p), per_group = Shape::blocks_per_group(p), group_dim = p.dim / p.groups;
  const int64_t block = item % blocks, first = block % per_group * Shape::kChannels;
  Stretch s;
  s.slot = item / blocks;
  const Part part = part_of(p, call.split, s.slot);
  s.sequence = part.sequence;
  s.number = part.number;
  s.begin = part.begin;
  s.end = part.end;
  s.group = block / per_group;
  s.channel = s.group * group_dim + first;
  s.channels = static_cast<int>(min_of(Shape::kChannels, group_dim - first));
  return s;
}

template <class T>
__device__ __forceinline__ Source<T> source_of(const Activation& x, Order order, int64_t batch, int64_t channel, int64_t t) {
  return {static_cast<const T*>(x.data) + batch * x.batch_stride + channel * x.dim_stride + t * x.seq_stride, x.seq_stride,
          x.dim_stride, order};
}
template <class T>
__device__ __forceinline__ Source<T> source_of(const Params& p, const Projection& m, Order order, int64_t batch, int64_t group,
                                               int64_t t) {
  const int64_t own = group / (p.groups / m.groups);
  return {static_cast<const T*>(m.data) + batch * m.batch_stride + own * m.group_stride + t * m.seq_stride, m.seq_stride,
          m.state_stride, order};
}

// Puts the tile of positions from t0 on its way. Nothing for positions past the end, but a group is closed for every call.
template <class Shape>
__device__ __forceinline__ void stage_tile(const Team<128>& team, const ForwardCall& call, const Stretch& s, int64_t t0,
                                           char* to) {
  using T = typename Shape::T;
  const ForwardParams& p = call.p;
  if (t0 < s.end) {
    const int steps = static_cast<int>(min_of(Shape::kSteps, s.end - t0)), states = static_cast<int>(p.state);
    const int64_t batch = s.sequence.batch;
    constexpr int kBytes = Shape::Channels::kBytes;
    stage<Shape::kSteps, Shape::kChannels>(team, to, source_of<T>(p.u, call.order.u, batch, s.channel, t0), steps, s.channels);
    stage<Shape::kSteps, Shape::kChannels>(team, to + kBytes, source_of<T>(p.delta, call.order.delta, batch, s.channel, t0),
                                           steps, s.channels);
    if (p.z.data != nullptr && !call.ends_only) {
      stage<Shape::kSteps, Shape::kChannels>(team, to + 2 * kBytes, source_of<T>(p.z, call.order.z, batch, s.channel, t0), steps,
                                             s.channels);
    }
    if (!p.B.constant) {
      stage<Shape::kSteps, Shape::kStates>(team, to + 3 * kBytes, source_of<T>(p, p.B, call.order.B, batch, s.group, t0), steps,
                                           states);
    }
    if (!p.C.constant && !call.ends_only) {
      stage<Shape::kSteps, Shape::kStates>(team, to + 3 * kBytes + Shape::States::kBytes,
                                           source_of<T>(p, p.C, call.order.C, batch, s.group, t0), steps, states);
    }
  }
  fastlm::cuda::commit_copies();
}

// The same by pointers that move along, as long as tiles are whole: a fifth of the instructions.
template <class Shape>
struct TileMovers {
  using T = typename Shape::T;
  using ChannelMover = Mover<T, Shape::kSteps, Shape::kChannels, Shape::kThreads>;
  using StateMover = Mover<T, Shape::kSteps, Shape::kStates, Shape::kThreads>;
  ChannelMover u, delta, z;
  StateMover B, C;
  bool apply;

  __device__ __forceinline__ TileMovers(const ForwardCall& call, const Stretch& s, int thread)
      : u(channels(call.p.u, call.order.u, s), thread),
        delta(channels(call.p.delta, call.order.delta, s), thread),
        z(channels(call.p.z, call.order.z, s), thread),
        B(states(call, call.p.B, call.order.B, s), thread),
        C(states(call, call.p.C, call.order.C, s), thread) {
    const ForwardParams& p = call.p;
    const auto all_channels = [&](const Activation& x, Order order) {
      return ChannelMover::applies(channels(x, order, s), s.channels);
    };
    const auto all_states = [&](const Projection& x, Order order) {
      return x.constant || StateMover::applies(states(call, x, order, s), static_cast<int>(p.state));
    };
    apply = all_channels(p.u, call.order.u) && all_channels(p.delta, call.order.delta) &&
            (p.z.data == nullptr || all_channels(p.z, call.order.z)) && all_states(p.B, call.order.B) &&
            all_states(p.C, call.order.C);
  }

  static __device__ __forceinline__ Source<T> channels(const Activation& x, Order order, const Stretch& s) {
    return source_of<T>(x, order, s.sequence.batch, s.channel, s.begin);
  }
  static __device__ __forceinline__ Source<T> states(const ForwardCall& call, const Projection& x, Order order,
                                                     const Stretch& s) {
    return source_of<T>(call.p, x, order, s.sequence.batch, s.group, s.begin);
  }

  __device__ __forceinline__ void copy(const ForwardCall& call, const Stretch& s, char* to, int thread) {
    const ForwardParams& p = call.p;
    constexpr int kBytes = Shape::Channels::kBytes;
    u.copy(to, channels(p.u, call.order.u, s), thread);
    delta.copy(to + kBytes, channels(p.delta, call.order.delta, s), thread);
    if (p.z.data != nullptr && !call.ends_only) z.copy(to + 2 * kBytes, channels(p.z, call.order.z, s), thread);
    if (!p.B.constant) B.copy(to + 3 * kBytes, states(call, p.B, call.order.B, s), thread);
    if (!p.C.constant && !call.ends_only) {
      C.copy(to + 3 * kBytes + Shape::States::kBytes, states(call, p.C, call.order.C, s), thread);
    }
  }
};

}  // namespace fastlm::selective_scan::cuda
