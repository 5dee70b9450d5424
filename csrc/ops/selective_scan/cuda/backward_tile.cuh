// The backward scan on CUDA, first part: what a team works on, its shared memory, and how tiles come and become steps.
#pragma once

#include "ops/selective_scan/cuda/backward_call.h"
#include "ops/selective_scan/cuda/functions.cuh"
#include "ops/selective_scan/cuda/sequences.cuh"
#include "ops/selective_scan/cuda/stage.cuh"

namespace fastlm::selective_scan::cuda {

using fastlm::cuda::kFullWarp;
using fastlm::cuda::Team;

// kMany: more than kBackwardStates states, visited in groups. kPlain: B and C are given per position.
template <class T_, bool kMany_, bool kPlain_>
struct BackwardShape {
  using T = T_;
  using A = acc_t<T>;
  static constexpr bool kMany = kMany_, kPlain = kPlain_;
  static constexpr int kThreads = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kLanes = 4, kPer = 4, kStates = kBackwardStates, kSub = kBackwardSub;
  static constexpr int kChannels = kThreads / kLanes, kWarps = kThreads / 32;
  static constexpr int kSteps = static_cast<int>(kChunk), kSubs = kSteps / kSub;
  static constexpr int kEach = kSub * kChannels / kThreads;  // (position, channel) pairs of a thread
  static_assert(kLanes * kPer == kStates && kSteps % kSub == 0);

  using Channels = Tile<T, kSteps, kChannels>;   // u, delta while steps are formed
  using States = Tile<T, kSteps, kStates>;       // B, C
  using SubChannels = Tile<T, kSub, kChannels>;  // u, delta, z, dout of a few positions
  static constexpr int kSize = static_cast<int>(sizeof(A));
  // From the start of shared memory; all multiples of 16.
  static constexpr int kPairs = kSubs * kThreads * kPer * kSize;  // after the kept states: (dt, dt u)
  static constexpr int kB = kPairs + kSteps * kChannels * 2 * kSize;
  static constexpr int kC = kB + kSteps * kStates * kSize;
  static constexpr int kRing = kC + kSteps * kStates * kSize;
  static constexpr int kDy = kRing + 4 * SubChannels::kBytes;
  static constexpr int kTotals = kDy + kSub * kChannels * kSize;  // kMany: sums over groups of states
  static constexpr int kWork = kTotals + (kMany ? 3 * kSteps * kChannels * kSize : 0);
  // Sums over a lane's states, then the terms of dB or dC of each warp; first the tiles of u, delta, B and C.
  static constexpr int kLaneSums = 3 * kSub * kThreads * kSize;
  static constexpr int kWarpTerms = kSub * 32 * kPer * kSize;
  static constexpr int kRaw = 2 * Channels::kBytes + 2 * States::kBytes;
  static constexpr int kWorkBytes = kLaneSums + kWarps * kWarpTerms > kRaw ? kLaneSums + kWarps * kWarpTerms : kRaw;
  static constexpr int kSharedBytes = kWork + kWorkBytes;

  static __host__ __device__ int64_t blocks_per_group(const Params& p) { return ceil_div(p.dim / p.groups, kChannels); }
  static __host__ __device__ int64_t blocks(const Params& p) { return p.groups * blocks_per_group(p); }
};

// A block of channels of one group.
struct BackwardBlock {
  int64_t index, group, channel;  // `channel`: the first
  int channels;
};

template <class Shape>
__device__ __forceinline__ BackwardBlock backward_block(const Params& p, int64_t index) {
  const int64_t per_group = Shape::blocks_per_group(p), group_dim = p.dim / p.groups;
  const int64_t group = index / per_group, first = index % per_group * Shape::kChannels;
  return {index, group, group * group_dim + first, static_cast<int>(min_of(Shape::kChannels, group_dim - first))};
}

template <class T>
__device__ __forceinline__ Source<T> tile_of(const Activation& x, Order order, int64_t batch, int64_t channel, int64_t t) {
  return {static_cast<const T*>(x.data) + batch * x.batch_stride + channel * x.dim_stride + t * x.seq_stride, x.seq_stride,
          x.dim_stride, order};
}
template <class T>
__device__ __forceinline__ Source<T> tile_of(const Params& p, const Projection& m, Order order, int64_t batch, int64_t group,
                                             int64_t t, int64_t state) {
  const int64_t own = m.groups == 1 ? 0 : group / (p.groups / m.groups);  // the common case without a division
  return {
      static_cast<const T*>(m.data) + batch * m.batch_stride + own * m.group_stride + t * m.seq_stride + state * m.state_stride,
      m.seq_stride, m.state_stride, order};
}

// Positions [t0, t0 + steps) of a block of channels of a row of the batch.
struct Positions {
  int64_t batch, t0;
  int steps;
};

// Brings the inputs of a few positions into the ring, for `Inputs`: sub-chunks of a chunk from the last to the first.
template <class Shape>
struct SubMover {
  using T = typename Shape::T;
  using Tile = typename Shape::SubChannels;
  static constexpr int kThreads = Shape::kThreads, kSub = Shape::kSub, kChannels = Shape::kChannels, kVector = Tile::kVector;
  static constexpr int kPieces = kSub * kChannels / kVector, kEach = 4 * kPieces / kThreads;
  static_assert(4 * kPieces % kThreads == 0 && Tile::kRowVectors && Tile::kColumnVectors);

  // What a thread copies of each sub-chunk where all pieces are whole and aligned: found once, then moved.
  const T* from[kEach];
  int64_t back[kEach];
  int to[kEach];         // bytes; negative: nothing to copy
  int rows_step[kEach];  // position of the piece in the sub-chunk, for tensors by rows; else 0
  bool fast;

  static __device__ __forceinline__ void choose(const BackwardParams& p, const BackwardOrders& orders, int which, Activation& x,
                                                Order& order) {
    x = which == 0 ? p.u : which == 1 ? p.delta : which == 2 ? p.z : p.dout;
    order = which == 0 ? orders.u : which == 1 ? orders.delta : which == 2 ? orders.z : orders.dout;
  }

  // Whether a tensor's pieces are whole and aligned in chunks that begin a multiple of kChunk after t0.
  static __device__ __forceinline__ bool aligned(const Activation& x, Order order, int64_t batch, const BackwardBlock& block,
                                                 int64_t t0, int steps) {
    if (x.data == nullptr) return true;
    const T* first = static_cast<const T*>(x.data) + batch * x.batch_stride + block.channel * x.dim_stride + t0 * x.seq_stride;
    const int64_t stride = order == Order::kRows ? x.seq_stride : x.dim_stride;
    return order != Order::kScattered && block.channels == kChannels &&
           (reinterpret_cast<uintptr_t>(first) | stride * sizeof(T)) % 16 == 0 && (order == Order::kRows || steps % kSub == 0);
  }

  __device__ __forceinline__ void start(int thread, const BackwardCall& call, const BackwardBlock& block, const Positions& s,
                                        int sub) {
    const BackwardParams& p = call.p;
    const auto usable = [&](const Activation& x, Order order) { return aligned(x, order, s.batch, block, s.t0, s.steps); };
    fast = usable(p.u, call.order.u) && usable(p.delta, call.order.delta) && usable(p.z, call.order.z) &&
           usable(p.dout, call.order.dout);
    if (!fast) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int which = (thread + i * kThreads) / kPieces, piece = (thread + i * kThreads) % kPieces;
      Activation x;
      Order order;
      choose(p, call.order, which, x, order);
      constexpr int kRow = kChannels / kVector, kColumn = kSub / kVector;
      const bool rows = order == Order::kRows;
      const int t = rows ? piece / kRow : piece % kColumn * kVector, c = rows ? piece % kRow * kVector : piece / kColumn;
      from[i] = static_cast<const T*>(x.data) + s.batch * x.batch_stride + (block.channel + c) * x.dim_stride +
                (s.t0 + sub * kSub + t) * x.seq_stride;
      back[i] = kSub * x.seq_stride;
      to[i] = x.data == nullptr
                  ? -1
                  : which * Tile::kBytes + (rows ? t * kChannels + c : c * Tile::kColumnStride + t) * static_cast<int>(sizeof(T));
      rows_step[i] = rows ? t : 0;
    }
  }

  // `sub` is one less at every call after `start`.
  __device__ __forceinline__ void copy(const Team<kThreads>& team, const BackwardCall& call, const BackwardBlock& block,
                                       const Positions& s, int sub, char* ring) {
    if (fast) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool valid = sub * kSub + rows_step[i] < s.steps;
        if (to[i] >= 0)
          fastlm::cuda::copy_async<16>(ring + to[i], valid ? from[i] : from[i] - rows_step[i] * (back[i] / kSub), valid);
        from[i] -= back[i];
      }
    } else {
      slow_copy(team, call, block, s, sub, ring);
    }
    fastlm::cuda::commit_copies();
  }

  static __device__ __forceinline__ void slow_copy(const Team<kThreads>& team, const BackwardCall& call,
                                                   const BackwardBlock& block, const Positions& s, int sub, char* ring) {
    const BackwardParams& p = call.p;
    const int64_t t0 = s.t0 + sub * kSub;
    const int steps = static_cast<int>(min_of(kSub, s.steps - sub * kSub));
#pragma unroll 1
    for (int which = 0; which < 4; ++which) {
      Activation x;
      Order order;
      choose(p, call.order, which, x, order);
      if (x.data == nullptr) continue;
      stage<kSub, kChannels>(team, ring + which * Tile::kBytes, tile_of<T>(x, order, s.batch, block.channel, t0), steps,
                             block.channels);
    }
  }
};

template <class Shape>
__device__ __forceinline__ void stage_states(const Team<Shape::kThreads>& team, const BackwardCall& call,
                                             const BackwardBlock& block, const Positions& s, int64_t state, char* raw) {
  using T = typename Shape::T;
  const BackwardParams& p = call.p;
  const int states = static_cast<int>(min_of(Shape::kStates, p.state - state));
  if (!p.B.constant) {
    stage<Shape::kSteps, Shape::kStates>(team, raw, tile_of<T>(p, p.B, call.order.B, s.batch, block.group, s.t0, state), s.steps,
                                         states);
  }
  if (!p.C.constant) {
    stage<Shape::kSteps, Shape::kStates>(team, raw + Shape::States::kBytes,
                                         tile_of<T>(p, p.C, call.order.C, s.batch, block.group, s.t0, state), s.steps, states);
  }
  fastlm::cuda::commit_copies();
}

// B and C in fp32.
template <class Shape>
__device__ __forceinline__ void form_states(const Team<Shape::kThreads>& team, const BackwardCall& call, const char* raw,
                                            typename Shape::A* B, typename Shape::A* C) {
  using T = typename Shape::T;
  constexpr int kStates = Shape::kStates;
  const BackwardParams& p = call.p;
  const Staged<T, Shape::kSteps, kStates> b(raw, call.order.B), c(raw + Shape::States::kBytes, call.order.C);
#pragma unroll 2
  for (int i = team.thread; i < Shape::kSteps * kStates; i += Shape::kThreads) {
    if (!p.B.constant) B[i] = b.at(i / kStates, i % kStates);
    if (!p.C.constant) C[i] = c.at(i / kStates, i % kStates);
  }
}

// The rest of a channel's parameters, for the thread that forms its steps.
template <class A>
struct ChannelParameters {
  A bias, skip;
  bool there;
  __device__ __forceinline__ ChannelParameters(const Params& p, const BackwardBlock& block, int channel)
      : bias(0), skip(0), there(channel < block.channels) {
    if (!there) return;
    bias =
        fastlm::cuda::load_param<A>(p.delta_bias.data, p.delta_bias.dtype, (block.channel + channel) * p.delta_bias.dim_stride);
    skip = fastlm::cuda::load_param<A>(p.D.data, p.D.dtype, (block.channel + channel) * p.D.dim_stride);
  }
};

// Steps (dt, dt u) of a chunk; past `steps`, 0: states and gradients of states stay as they are there.
template <class Shape>
__device__ __forceinline__ void form_pairs(const Team<Shape::kThreads>& team, const BackwardCall& call, int steps,
                                           const char* raw, typename Shape::A bias, typename Shape::A* pairs) {
  using T = typename Shape::T;
  using A = typename Shape::A;
  constexpr int kChannels = Shape::kChannels;
  const Staged<T, Shape::kSteps, kChannels> u(raw, call.order.u), delta(raw + Shape::Channels::kBytes, call.order.delta);
  const int channel = team.thread % kChannels;
#pragma unroll 2
  for (int t = team.thread / kChannels; t < Shape::kSteps; t += Shape::kThreads / kChannels) {
    A dt = delta.at(t, channel) + bias;
    if (call.p.delta_softplus) dt = softplus<sizeof(T) != 2>(dt);
    if (t >= steps) dt = A(0);
    A* pair = pairs + (t * kChannels + channel) * 2;
    pair[0] = dt;
    pair[1] = dt * u.at(t, channel);
  }
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return fastlm::cuda::rcp_approx(1.0f + power_of_two(-x * static_cast<float>(kLog2e)));
}
__device__ __forceinline__ double fast_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// What a thread needs of its positions of a sub-chunk, one channel: x = delta + bias, dy, and dz / y.
template <class Shape>
struct Inputs {
  using T = typename Shape::T;
  using A = typename Shape::A;
  static constexpr int kEach = Shape::kEach;
  A u[kEach], x[kEach], dy[kEach], gate[kEach];

  static __device__ __forceinline__ int step(int thread, int i) {
    return thread / Shape::kChannels + i * (Shape::kThreads / Shape::kChannels);
  }

  // Where they are in the ring: the first, and from there to the next.
  const T* first[4];
  int gap[4];
  __device__ __forceinline__ void place(int thread, const BackwardCall& call, const char* ring) {
    const Order orders[4] = {call.order.u, call.order.delta, call.order.z, call.order.dout};
#pragma unroll
    for (int which = 0; which < 4; ++which) {
      const Staged<T, Shape::kSub, Shape::kChannels> tile(ring + which * Shape::SubChannels::kBytes, orders[which]);
      first[which] = tile.tile + step(thread, 0) * tile.step_stride + thread % Shape::kChannels * tile.column_stride;
      gap[which] = (step(thread, 1) - step(thread, 0)) * tile.step_stride;
    }
  }

  // Takes them from the ring and puts dy where all lanes of a channel see it.
  __device__ __forceinline__ void read(int thread, const BackwardCall& call, A bias, A* dy_tile) {
    const bool gated = call.p.z.data != nullptr;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const auto value = [&](int which) { return fastlm::cuda::to_acc(first[which][i * gap[which]]); };
      u[i] = value(0);
      x[i] = value(1) + bias;
      dy[i] = value(3);
      gate[i] = A(0);
      if (gated) {
        const A z = value(2), sigma = fast_sigmoid(z);
        gate[i] = dy[i] * (sigma * (A(1) + z * (A(1) - sigma)));
        dy[i] *= z * sigma;
      }
      dy_tile[step(thread, i) * Shape::kChannels + thread % Shape::kChannels] = dy[i];
    }
  }
};

}  // namespace fastlm::selective_scan::cuda
