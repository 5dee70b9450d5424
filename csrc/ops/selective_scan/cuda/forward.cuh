// Mamba-1 selective scan on CUDA, forward: h_t = exp2(dt_t A log2 e) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t + D u_t, gated by z.
//
// A team of 128 threads walks through time with kChannels channels: kLanes neighbouring threads hold the states of one, kPer
// each. Tiles of kSteps positions arrive in the background, kStages - 1 tiles ahead; each tile is first turned into what every
// lane of a channel needs (dt and dt u; B and C in fp32: once instead of in each lane), then scanned, then gated and stored with
// wide writes. The states' recurrence is one multiply-add a step; the exponentials of four steps do not wait for it.
//
// Bound for N = 16 by the special-function unit (4 exponentials a lane and step, 8 cycles each for a warp, and about one more for
// softplus and gate: 40 cycles) and just as much by instruction issue (docs/cuda.md counts them); DRAM is at 40 % then.
//
// Where channels times batch cannot fill a device, time is split: a pass over the parts with zero states before them (`ends`), a
// pass that carries states over the parts, and this scan of every part from its own first state.
#pragma once

#include "ops/selective_scan/cuda/forward_call.h"
#include "ops/selective_scan/cuda/functions.cuh"
#include "ops/selective_scan/cuda/sequences.cuh"
#include "ops/selective_scan/cuda/stage.cuh"

namespace fastlm::selective_scan::cuda {

using fastlm::cuda::kFullWarp;
using fastlm::cuda::Team;

template <class T_, int kLanes_, int kPer_, int kSteps_, int kStages_>
struct ForwardShape {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int kThreads = 128;
  static constexpr int kLanes = kLanes_, kPer = kPer_, kSteps = kSteps_, kStages = kStages_;
  static constexpr int kStates = kLanes * kPer, kChannels = kThreads / kLanes;
  static_assert(kChunk % kSteps == 0 && kSteps % 4 == 0 && kLanes >= 4);

  using Channels = Tile<T, kSteps, kChannels>;
  using States = Tile<T, kSteps, kStates>;
  static constexpr int kRawBytes = 3 * Channels::kBytes + 2 * States::kBytes;  // u, delta, z, B, C
  static constexpr int kSumStride = kChannels + 9;  // writes of 4 steps x 8 channels and reads of columns meet 32 banks
  static constexpr int kStepBytes = kSteps * kChannels * 2 * static_cast<int>(sizeof(A));  // pairs (dt, dt u)
  static constexpr int kMatrixBytes = kSteps * kStates * static_cast<int>(sizeof(A));
  static constexpr int kSumBytes = kSteps * kSumStride * static_cast<int>(sizeof(A));
  static constexpr int kSharedBytes = kStages * kRawBytes + kStepBytes + 2 * kMatrixBytes + (kSumBytes + 15) / 16 * 16;

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

// Steps (dt, dt u) of a tile, B and C in fp32. Past `steps` all is 0: the state stays as it is there.
template <class Shape>
__device__ __forceinline__ void prepare_tile(const Team<128>& team, const ForwardCall& call, const Stretch& s, int steps,
                                             const char* raw, typename Shape::A* pairs, typename Shape::A* B,
                                             typename Shape::A* C) {
  using T = typename Shape::T;
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  constexpr int kBytes = Shape::Channels::kBytes;
  const Staged<T, Shape::kSteps, Shape::kChannels> u(raw, call.order.u), delta(raw + kBytes, call.order.delta);
  const int channel = team.thread % Shape::kChannels;
  const A bias = channel < s.channels ? fastlm::cuda::load_param<A>(p.delta_bias.data, p.delta_bias.dtype,
                                                                    (s.channel + channel) * p.delta_bias.dim_stride)
                                      : A(0);
#pragma unroll 4
  for (int t = team.thread / Shape::kChannels; t < Shape::kSteps; t += Shape::kThreads / Shape::kChannels) {
    A dt = delta.at(t, channel) + bias;
    if (p.delta_softplus) dt = softplus(dt);
    if (t >= steps) dt = A(0);
    A* pair = pairs + (t * Shape::kChannels + channel) * 2;
    pair[0] = dt;
    pair[1] = dt * u.at(t, channel);
  }
  const Staged<T, Shape::kSteps, Shape::kStates> b(raw + 3 * kBytes, call.order.B),
      c(raw + 3 * kBytes + Shape::States::kBytes, call.order.C);
#pragma unroll 4
  for (int i = team.thread; i < Shape::kSteps * Shape::kStates; i += Shape::kThreads) {
    const int t = i / Shape::kStates, n = i % Shape::kStates;
    if (!p.B.constant) B[i] = b.at(t, n);
    if (!p.C.constant && !call.ends_only) C[i] = c.at(t, n);
  }
}

// Sums over the lanes of a channel of four values, one for each of four steps; lane l gets the one of step l % 4.
template <int kLanes, class A>
__device__ __forceinline__ A sum_over_lanes(const A (&y)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const A first = (odd ? y[1] : y[0]) + __shfl_xor_sync(kFullWarp, odd ? y[0] : y[1], 1);
  const A second = (odd ? y[3] : y[2]) + __shfl_xor_sync(kFullWarp, odd ? y[2] : y[3], 1);
  A sum = (high ? second : first) + __shfl_xor_sync(kFullWarp, high ? first : second, 2);
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
  return sum;
}

// How many of a lane's states get their exponentials from multiply-adds instead of the special-function unit. The same ones at
// every position: the bits of a sequence must not depend on where it is cut. 0: by instruction count both units are busy as it
// is.
constexpr int kFmaStates = 0;

__device__ __forceinline__ float decay_of(float x, int state) {
  return state < kFmaStates ? power_of_two_fma(x) : power_of_two(x);
}
__device__ __forceinline__ double decay_of(double x, int) { return power_of_two(x); }

template <int kPer, class A>
__device__ __forceinline__ void load_states(A (&to)[kPer], const A* from) {
#pragma unroll
  for (int i = 0; i < kPer; i += 16 / static_cast<int>(sizeof(A))) {
    if constexpr (sizeof(A) == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    } else {
      const double2 x = *reinterpret_cast<const double2*>(from + i);
      to[i] = x.x, to[i + 1] = x.y;
    }
  }
}

// Scans the prepared tile: y (sums over the states) of each position, h afterwards. kPlain: B and C per position, no states kept.
template <class Shape, bool kPlain, bool kEnds>
__device__ __forceinline__ void scan_tile(const ForwardCall& call, const Stretch& s, int64_t t0, int steps, int channel, int lane,
                                          const typename Shape::A (&decay)[Shape::kPer],
                                          const typename Shape::A (&b_constant)[Shape::kPer],
                                          const typename Shape::A (&c_constant)[Shape::kPer], const typename Shape::A* pairs,
                                          const typename Shape::A* B, const typename Shape::A* C, typename Shape::A* sums,
                                          typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  constexpr int kPer = Shape::kPer;
  const ForwardParams& p = call.p;
  const A* pair = pairs + channel * 2;
  const A* b_row = B + lane * kPer;
  const A* c_row = C + lane * kPer;
  for (int t4 = 0; t4 < steps; t4 += 4) {
    A y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = t4 + j;
      const A dt = pair[t * Shape::kChannels * 2], dtu = pair[t * Shape::kChannels * 2 + 1];
      A b[kPer], c[kPer];
      load_states<kPer>(b, b_row + t * Shape::kStates);
      if constexpr (!kEnds) load_states<kPer>(c, c_row + t * Shape::kStates);
      if constexpr (!kPlain) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (p.B.constant) b[i] = b_constant[i];
          if (p.C.constant) c[i] = c_constant[i];
        }
      }
      y[j] = A(0);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const A a = decay_of(dt * decay[i], i);
        h[i] = fastlm::cuda::multiply_add(a, h[i], dtu * b[i]);
        if constexpr (!kEnds) y[j] = fastlm::cuda::multiply_add(c[i], h[i], y[j]);
      }
      if constexpr (!kPlain && !kEnds) {
        if (p.all_states != nullptr && t < steps && channel < s.channels) {
          A* all =
              static_cast<A*>(p.all_states) + ((s.sequence.batch * p.seqlen + t0 + t) * p.dim + s.channel + channel) * p.state;
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            if (lane * kPer + i < p.state) all[lane * kPer + i] = h[i];
          }
        }
      }
    }
    if constexpr (!kEnds) {
      const A sum = sum_over_lanes<Shape::kLanes>(y, lane);
      if (lane < 4) sums[(t4 + lane) * Shape::kSumStride + channel] = sum;
    }
  }
}

// Skip connection, gate and store.
template <class Shape>
__device__ __forceinline__ void store_tile(const Team<128>& team, const ForwardCall& call, const Stretch& s, int64_t t0,
                                           int steps, const char* raw, const typename Shape::A* sums) {
  using T = typename Shape::T;
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  constexpr int kBytes = Shape::Channels::kBytes, kVector = 16 / static_cast<int>(sizeof(T));
  const Staged<T, Shape::kSteps, Shape::kChannels> u(raw, call.order.u), z(raw + 2 * kBytes, call.order.z);
  T* out =
      static_cast<T*>(p.out.data) + s.sequence.batch * p.out.batch_stride + s.channel * p.out.dim_stride + t0 * p.out.seq_stride;
  const bool gated = p.z.data != nullptr;
  const auto value = [&](int t, int channel, A skip) {
    A y = fastlm::cuda::multiply_add(skip, u.at(t, channel), sums[t * Shape::kSumStride + channel]);
    if (gated) y *= silu(z.at(t, channel));
    return fastlm::cuda::from_acc<T>(y);
  };
  const auto skip_of = [&](int channel) {
    return channel < s.channels ? fastlm::cuda::load_param<A>(p.D.data, p.D.dtype, (s.channel + channel) * p.D.dim_stride) : A(0);
  };
  if constexpr (Shape::kChannels % kVector == 0) {
    const bool wide = call.order.out == Order::kRows && s.channels % kVector == 0 &&
                      (reinterpret_cast<uintptr_t>(out) | p.out.seq_stride * sizeof(T)) % 16 == 0;
    if (wide) {
      constexpr int kPieces = Shape::kChannels / kVector;
      const int first = team.thread % kPieces * kVector;
      A skip[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) skip[i] = skip_of(first + i);
      for (int t = team.thread / kPieces; t < steps; t += Shape::kThreads / kPieces) {
        if (first >= s.channels) break;
        alignas(16) T piece[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) piece[i] = value(t, first + i, skip[i]);
        *reinterpret_cast<uint4*>(out + t * p.out.seq_stride + first) = *reinterpret_cast<const uint4*>(piece);
      }
      return;
    }
  }
  const bool by_columns = call.order.out == Order::kColumns;
  for (int i = team.thread; i < Shape::kSteps * Shape::kChannels; i += Shape::kThreads) {
    const int t = by_columns ? i % Shape::kSteps : i / Shape::kChannels;
    const int channel = by_columns ? i / Shape::kSteps : i % Shape::kChannels;
    if (t < steps && channel < s.channels) {
      out[t * p.out.seq_stride + channel * p.out.dim_stride] = value(t, channel, skip_of(channel));
    }
  }
}

// One stretch of one block of channels. Shared: Shape::kSharedBytes, aligned to 16.
template <class Shape, bool kEnds = false>
__device__ void forward_tile(const Team<128>& team, const ForwardCall& call, int64_t item, char* shared) {
  using A = typename Shape::A;
  constexpr int kPer = Shape::kPer;
  const ForwardParams& p = call.p;
  const Stretch s = stretch_of<Shape>(call, item);
  if (s.number < 0) return;

  A* pairs = reinterpret_cast<A*>(shared + Shape::kStages * Shape::kRawBytes);
  A* B = reinterpret_cast<A*>(shared + Shape::kStages * Shape::kRawBytes + Shape::kStepBytes);
  A* C = B + Shape::kSteps * Shape::kStates;
  A* sums = C + Shape::kSteps * Shape::kStates;

  const int channel = team.thread / Shape::kLanes, lane = team.thread % Shape::kLanes;
  const bool real = channel < s.channels;
  const int64_t d = s.channel + channel;
  A decay[kPer], h[kPer], b_constant[kPer], c_constant[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = lane * kPer + i;
    const bool there = real && n < p.state;
    // Rounded once: the error is that of every exponent of the channel.
    decay[i] = there ? static_cast<A>(kLog2e * fastlm::cuda::load_param<double>(p.A.data, p.A.dtype,
                                                                                d * p.A.dim_stride + n * p.A.state_stride))
                     : A(0);
    b_constant[i] = there && p.B.constant
                        ? fastlm::cuda::load_param<A>(p.B.data, p.B.dtype, d * p.B.dim_stride + n * p.B.state_stride)
                        : A(0);
    c_constant[i] = there && p.C.constant
                        ? fastlm::cuda::load_param<A>(p.C.data, p.C.dtype, d * p.C.dim_stride + n * p.C.state_stride)
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
  const bool plain = !p.B.constant && !p.C.constant && (kEnds || p.all_states == nullptr);

#pragma unroll
  for (int i = 0; i + 1 < Shape::kStages; ++i) {
    stage_tile<Shape>(team, call, s, s.begin + i * Shape::kSteps, shared + i * Shape::kRawBytes);
  }
  A total = A(0);  // of the step sizes of a part
  int stage = 0;
  for (int64_t t0 = s.begin; t0 < s.end; t0 += Shape::kSteps) {
    const int steps = static_cast<int>(min_of(Shape::kSteps, s.end - t0));
    const int ahead = stage == 0 ? Shape::kStages - 1 : stage - 1;  // where the tile before last lay, or this one if it is alone
    const char* raw = shared + stage * Shape::kRawBytes;
    stage_tile<Shape>(team, call, s, t0 + (Shape::kStages - 1) * Shape::kSteps, shared + ahead * Shape::kRawBytes);
    fastlm::cuda::wait_copies<Shape::kStages - 1>();
    team.sync();
    prepare_tile<Shape>(team, call, s, steps, raw, pairs, B, C);
    team.sync();
    if (plain) {
      scan_tile<Shape, true, kEnds>(call, s, t0, steps, channel, lane, decay, b_constant, c_constant, pairs, B, C, sums, h);
    } else {
      scan_tile<Shape, false, kEnds>(call, s, t0, steps, channel, lane, decay, b_constant, c_constant, pairs, B, C, sums, h);
    }
    if constexpr (kEnds) {
      for (int t = 0; t < steps; ++t) total += pairs[(t * Shape::kChannels + channel) * 2];
      team.sync();  // nobody reads the pairs any more
    } else {
      const int64_t done = t0 + steps - s.sequence.begin;
      if (done % kChunk == 0 && real) {
        A* chunk = static_cast<A*>(p.chunk_states) + (s.sequence.chunk_begin + done / kChunk - 1) * p.state * p.dim + d;
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (lane * kPer + i < p.state) chunk[(lane * kPer + i) * p.dim] = h[i];
        }
      }
      team.sync();
      store_tile<Shape>(team, call, s, t0, steps, raw, sums);
      team.sync();  // the next tile's copies may write over this one
    }
    if (++stage == Shape::kStages) stage = 0;
  }
  fastlm::cuda::wait_copies<0>();

  if (!real) return;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = lane * kPer + i;
    if (n >= p.state) continue;
    if constexpr (kEnds) {
      const int64_t at = (s.slot * p.state + n) * p.dim + d;
      static_cast<A*>(call.split.end_states)[at] = h[i];
      static_cast<A*>(call.split.decays)[at] = power_of_two(decay[i] * total);
    } else if (s.end == s.sequence.end) {
      static_cast<A*>(p.last_state)[(s.number * p.dim + d) * p.state + n] = h[i];
    }
  }
}

template <class Shape, bool kEnds>
__global__ void __launch_bounds__(Shape::kThreads) forward_kernel(const __grid_constant__ ForwardCall call, int64_t items) {
  const Team<128> team{static_cast<int>(threadIdx.x), 1};
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    forward_tile<Shape, kEnds>(team, call, item, fastlm::cuda::shared_memory());
    if (item + gridDim.x < items) team.sync();
  }
}

}  // namespace fastlm::selective_scan::cuda
