// The backward scan on CUDA with two channels a lane, first part: shared memory, and how tiles come and become steps.
#pragma once

#include "ops/selective_scan/cuda/backward_tile.cuh"

namespace fastlm::selective_scan::cuda {

// Each warp has 16 channels of its own: 8 pairs of neighbours, 4 lanes a pair, 4 states of both channels a lane. T has 16 bits.
template <class T_>
struct PairedShape {
  using T = T_;
  using A = float;
  static constexpr int kThreads = 128, kWarps = kThreads / 32;
  static constexpr int kLanes = 4, kPer = 4, kStates = kBackwardStates, kSub = kBackwardSub;
  static constexpr int kSteps = static_cast<int>(kChunk), kSubs = kSteps / kSub;
  static constexpr int kPairs = 32 / kLanes, kWarpChannels = 2 * kPairs, kChannels = kWarps * kWarpChannels;
  static_assert(sizeof(T) == 2 && kLanes * kPer == kStates && kChannels == kPairedChannels);

  using Channels = Tile<T, kSteps, kChannels>;  // u, delta while steps are formed
  using States = Tile<T, kSteps, kStates>;      // B, C
  // Kept states: [sub-chunk][warp][of the pair][lane][state]. Once a warp has taken those of a sub-chunk, its sums of dB and dC
  // take their place: [position][state] twice. Before, the tiles of u, delta, B and C lie there.
  static constexpr int kWarpKept = 2 * 32 * kPer, kKept = kWarps * kWarpKept;  // floats of a sub-chunk
  static_assert(kWarpKept == 2 * kSub * kStates);
  static constexpr int kRaw = 0;
  static constexpr int kStepsAt = kSubs * kKept * 4;  // bytes: (dt, dt u) [position][channel]
  static constexpr int kB = kStepsAt + kSteps * kChannels * 8;
  static constexpr int kC = kB + kSteps * kStates * 4;
  static constexpr int kWarpAt = kC + kSteps * kStates * 4;
  static_assert(2 * Channels::kBytes + 2 * States::kBytes <= kStepsAt);
  // Of each warp. Sums over a lane's states, [2][position][pair][lane][of the pair]: first y, then those of lambda B and of
  // lambda decay a h; terms of dB or dC, [position][pair][state]; u, delta, z and dout of a few positions; dy and dz / y of
  // these.
  static constexpr int kLaneSums = kSub * 64;  // floats of one kind
  static constexpr int kTerms = 2 * kLaneSums * 4;
  static constexpr int kRing = kTerms + kSub * kPairs * kStates * 4, kRingTile = kSub * kWarpChannels * 2;
  static constexpr int kDy = kRing + 4 * kRingTile;
  static constexpr int kGate = kDy + kSub * kWarpChannels * 4;
  static constexpr int kWarpBytes = kGate + kSub * kWarpChannels * 4;
  static constexpr int kSharedBytes = kWarpAt + kWarps * kWarpBytes;
  static_assert(kSharedBytes == kPairedShared);

  static __host__ __device__ int64_t blocks_per_group(const Params& p) { return ceil_div(p.dim / p.groups, kChannels); }
  static __host__ __device__ int64_t blocks(const Params& p) { return p.groups * blocks_per_group(p); }
};

// Two values of each of a lane's items, (pair, position): the pair lane % 8, positions lane / 8 and 4 more.
struct Item {
  static constexpr int kEach = 2;
  static __device__ __forceinline__ int pair(int lane) { return lane % 8; }
  static __device__ __forceinline__ int step(int lane, int i) { return lane / 8 + 4 * i; }
};

// Brings the inputs of a warp's channels into its ring, sub-chunks from the last to the first: u and delta, and, a sub-chunk
// ahead of them, z and dout.
template <class Shape>
struct WarpMover {
  using T = typename Shape::T;
  static constexpr int kSub = Shape::kSub, kWidth = Shape::kWarpChannels, kVector = 8;

  // What a lane copies of each sub-chunk where all pieces are whole and aligned: found once, then moved.
  const T* from[2];  // u or delta; z or dout
  int64_t back[2];
  bool fast;

  // Copies sub-chunk `sub`, the last of a chunk. `first_channel`: the warp's first in the block.
  __device__ __forceinline__ void start(int lane, const BackwardCall& call, const BackwardBlock& block, int first_channel,
                                        const Positions& s, int sub, char* ring) {
    const BackwardParams& p = call.p;
    const int64_t channel = block.channel + first_channel;
    const auto usable = [&](const Activation& x, Order order) {
      if (x.data == nullptr) return true;
      const T* first = static_cast<const T*>(x.data) + s.batch * x.batch_stride + channel * x.dim_stride + s.t0 * x.seq_stride;
      const int64_t stride = order == Order::kRows ? x.seq_stride : x.dim_stride;
      return order != Order::kScattered && block.channels == Shape::kChannels &&
             (reinterpret_cast<uintptr_t>(first) | stride * sizeof(T)) % 16 == 0 &&
             (order == Order::kRows || s.steps % kSub == 0);
    };
    fast = usable(p.u, call.order.u) && usable(p.delta, call.order.delta) && usable(p.z, call.order.z) &&
           usable(p.dout, call.order.dout);
    if (!fast) {
      slow_copy(lane, call, block, first_channel, s, sub, 0, ring);
      slow_copy(lane, call, block, first_channel, s, sub, 2, ring);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool second = lane >= 16;
      const Activation& x = i == 0 ? (second ? p.delta : p.u) : (second ? p.dout : p.z);
      const Order order = i == 0 ? (second ? call.order.delta : call.order.u) : (second ? call.order.dout : call.order.z);
      const bool rows = order == Order::kRows;
      const int piece = lane % 16, t = rows ? piece / 2 : 0, c = rows ? piece % 2 * kVector : piece;
      const T* first = static_cast<const T*>(x.data) + s.batch * x.batch_stride + (channel + c) * x.dim_stride +
                       (s.t0 + sub * kSub) * x.seq_stride;
      const bool valid = sub * kSub + t < s.steps;
      from[i] = first + t * x.seq_stride;
      if (x.data != nullptr) fastlm::cuda::copy_async<16>(place(lane, i, ring), valid ? from[i] : first, valid);
      back[i] = kSub * x.seq_stride;
      from[i] -= back[i];
    }
  }

  // Where a lane's piece goes: those of the two tensors follow each other.
  static __device__ __forceinline__ char* place(int lane, int i, char* ring) {
    static_assert(Shape::kRingTile == 16 * 16);
    return ring + 2 * i * Shape::kRingTile + lane * 16;
  }

  // Those of the sub-chunk before the last one that came.
  template <int kWhich>
  __device__ __forceinline__ void copy(int lane, const BackwardCall& call, const BackwardBlock& block, int first_channel,
                                       const Positions& s, int sub, char* ring) {
    if (fast) {
      if (kWhich == 0 || lane >= 16 || call.p.z.data != nullptr) {
        fastlm::cuda::copy_async<16>(place(lane, kWhich, ring), from[kWhich]);
      }
      from[kWhich] -= back[kWhich];
    } else {
      slow_copy(lane, call, block, first_channel, s, sub, 2 * kWhich, ring);
    }
  }

  // Not inlined: so nothing of it stands in the loop over sub-chunks.
  static __device__ __attribute__((noinline)) void slow_copy(int lane, const BackwardCall& call, const BackwardBlock& block,
                                                             int first_channel, const Positions& s, int sub, int first,
                                                             char* ring) {
    const BackwardParams& p = call.p;
    const int64_t channel = block.channel + first_channel;
    const int channels = block.channels - first_channel;
#pragma unroll 1
    for (int which = first; which < first + 2; ++which) {
      const Activation& x = which == 0 ? p.u : which == 1 ? p.delta : which == 2 ? p.z : p.dout;
      const Order order = which == 0 ? call.order.u : which == 1 ? call.order.delta : which == 2 ? call.order.z : call.order.dout;
      if (x.data == nullptr) continue;
      T* tile = reinterpret_cast<T*>(ring + which * Shape::kRingTile);
      const T* data = static_cast<const T*>(x.data) + s.batch * x.batch_stride + channel * x.dim_stride + s.t0 * x.seq_stride;
#pragma unroll 1
      for (int i = lane; i < kSub * kWidth; i += 32) {
        const bool columns = order == Order::kColumns;
        const int t = sub * kSub + (columns ? i % kSub : i / kWidth), c = columns ? i / kSub : i % kWidth;
        T value{};
        if (t < s.steps && c < channels) value = data[t * x.seq_stride + c * x.dim_stride];
        tile[i] = value;
      }
    }
  }
};

// Two elements of T that follow each other, the first 4-byte aligned.
template <class T>
__device__ __forceinline__ void unpack_pair(const T* from, float (&x)[2]) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
  x[0] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(word & 0xffff)});
  x[1] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(word >> 16)});
}

// Two neighbouring channels' elements of a position in a warp's ring. kRows: no order is kColumns.
template <class Shape, bool kRows>
__device__ __forceinline__ void read_pair(const char* ring, int which, Order order, int step, int pair, float (&x)[2]) {
  using T = typename Shape::T;
  const T* tile = reinterpret_cast<const T*>(ring + which * Shape::kRingTile);
  if (kRows || order != Order::kColumns) {
    unpack_pair(tile + step * Shape::kWarpChannels + 2 * pair, x);
  } else {
    const T* at = tile + 2 * pair * Shape::kSub + step;
    x[0] = fastlm::cuda::to_acc(at[0]);
    x[1] = fastlm::cuda::to_acc(at[Shape::kSub]);
  }
}

// B or C in fp32: eight elements a thread, states of a position or positions of a state.
template <class Shape>
__device__ __forceinline__ void widen_states(int thread, const char* raw, Order order, float* to) {
  using T = typename Shape::T;
  constexpr int kStates = Shape::kStates;
  static_assert(Shape::kSteps * kStates == 8 * Shape::kThreads && kStates == 16);
  const T* tile = reinterpret_cast<const T*>(raw);
  const bool columns = order == Order::kColumns;
  const uint4 words = *reinterpret_cast<const uint4*>(
      tile + (columns ? thread % 16 * Shape::States::kColumnStride + thread / 16 * 8 : thread * 8));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  float x[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(word[i] & 0xffff)});
    x[2 * i + 1] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(word[i] >> 16)});
  }
  if (columns) {
    to += thread / 16 * 8 * kStates + thread % 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i * kStates] = x[i];
  } else {
    to += thread * 8;
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
  }
}

// Steps (dt, dt u) of a chunk and the channels of a warp; past `steps`, 0. `first`: the warp's first channel in the block. kRows:
// neither order is kColumns.
template <class Shape, bool kRows>
__device__ __forceinline__ void form_steps(int lane, int first, const BackwardCall& call, int steps, const char* raw,
                                           const float (&bias)[2], float* to) {
  using T = typename Shape::T;
  const Staged<T, Shape::kSteps, Shape::kChannels> u(raw, kRows ? Order::kRows : call.order.u),
      delta(raw + Shape::Channels::kBytes, kRows ? Order::kRows : call.order.delta);
  const int channel = first + 2 * Item::pair(lane);
  const T* u_at = u.tile + channel * u.column_stride + lane / 8 * u.step_stride;
  const T* delta_at = delta.tile + channel * delta.column_stride + lane / 8 * delta.step_stride;
  to += (lane / 8 * Shape::kChannels + channel) * 2;
#pragma unroll 2
  for (int t = lane / 8; t < Shape::kSteps; t += 4) {
    float dt[2], value[2];
    if constexpr (kRows) {
      unpack_pair(delta_at, dt);
      unpack_pair(u_at, value);
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        dt[c] = fastlm::cuda::to_acc(delta_at[c * delta.column_stride]);
        value[c] = fastlm::cuda::to_acc(u_at[c * u.column_stride]);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      dt[c] += bias[c];
      if (call.p.delta_softplus) dt[c] = softplus<false>(dt[c]);
      if (t >= steps) dt[c] = 0.0f;
    }
    *reinterpret_cast<float4*>(to) = make_float4(dt[0], dt[0] * value[0], dt[1], dt[1] * value[1]);
    u_at += 4 * u.step_stride, delta_at += 4 * delta.step_stride, to += 4 * Shape::kChannels * 2;
  }
}

}  // namespace fastlm::selective_scan::cuda
