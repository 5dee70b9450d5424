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

#include "ops/selective_scan/cuda/forward_scan.cuh"

namespace fastlm::selective_scan::cuda {

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
#pragma unroll 2
  for (int t = team.thread / Shape::kChannels; t < Shape::kSteps; t += Shape::kThreads / Shape::kChannels) {
    A dt = delta.at(t, channel) + bias;
    if (p.delta_softplus) dt = softplus<sizeof(T) != 2>(dt);
    if (t >= steps) dt = A(0);
    A* pair = pairs + (t * Shape::kChannels + channel) * 2;
    pair[0] = dt;
    pair[1] = dt * u.at(t, channel);
  }
  const Staged<T, Shape::kSteps, Shape::kStates> b(raw + 3 * kBytes, call.order.B),
      c(raw + 3 * kBytes + Shape::States::kBytes, call.order.C);
#pragma unroll 2
  for (int i = team.thread; i < Shape::kSteps * Shape::kStates; i += Shape::kThreads) {
    const int t = i / Shape::kStates, n = i % Shape::kStates;
    if (!p.B.constant) B[i] = b.at(t, n);
    if (!p.C.constant && !call.ends_only) C[i] = c.at(t, n);
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
#pragma unroll 1
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
#pragma unroll 1
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
  A decay[kPer], h[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = lane * kPer + i;
    const bool there = real && n < p.state;
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
  const bool plain = !p.B.constant && !p.C.constant && (kEnds || p.all_states == nullptr);

  TileMovers<Shape> movers(call, s, team.thread);
  const auto fetch = [&](int64_t t0, char* to) {
    if (movers.apply && t0 + Shape::kSteps <= s.end) {
      movers.copy(call, s, to, team.thread);
      fastlm::cuda::commit_copies();
    } else {
      stage_tile<Shape>(team, call, s, t0, to);
    }
  };
#pragma unroll 1
  for (int i = 0; i + 1 < Shape::kStages; ++i) fetch(s.begin + i * Shape::kSteps, shared + i * Shape::kRawBytes);
  A total = A(0);  // of the step sizes of a part
  int stage = 0;
#pragma unroll 1
  for (int64_t t0 = s.begin; t0 < s.end; t0 += Shape::kSteps) {
    const int steps = static_cast<int>(min_of(Shape::kSteps, s.end - t0));
    const int ahead = stage == 0 ? Shape::kStages - 1 : stage - 1;  // where the tile before last lay, or this one if it is alone
    const char* raw = shared + stage * Shape::kRawBytes;
    fetch(t0 + (Shape::kStages - 1) * Shape::kSteps, shared + ahead * Shape::kRawBytes);
    fastlm::cuda::wait_copies<Shape::kStages - 1>();
    team.sync();
    prepare_tile<Shape>(team, call, s, steps, raw, pairs, B, C);
    team.sync();
    if constexpr (!kEnds && Shape::kAhead) {
      if (plain) {
        scan_tile_ahead<Shape>(steps, channel, lane, decay, pairs, B, C, sums, h);
      } else {
        scan_tile<Shape, false, kEnds>(call, s, t0, steps, channel, lane, decay, pairs, B, C, sums, h);
      }
    } else if (plain) {
      scan_tile<Shape, true, kEnds>(call, s, t0, steps, channel, lane, decay, pairs, B, C, sums, h);
    } else {
      scan_tile<Shape, false, kEnds>(call, s, t0, steps, channel, lane, decay, pairs, B, C, sums, h);
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
__global__ void __launch_bounds__(Shape::kThreads, !kEnds && Shape::kPer == 4 && sizeof(typename Shape::A) == 4 ? 3 : 2)
    forward_kernel(const __grid_constant__ ForwardCall call, int64_t items) {
  const Team<128> team{static_cast<int>(threadIdx.x), 1};
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    forward_tile<Shape, kEnds>(team, call, item, fastlm::cuda::shared_memory());
    if (item + gridDim.x < items) team.sync();
  }
}

}  // namespace fastlm::selective_scan::cuda
