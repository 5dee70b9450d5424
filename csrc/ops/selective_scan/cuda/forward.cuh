// Mamba-1 selective scan on CUDA, forward: h_t = exp2(dt_t A log2 e) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t + D u_t, gated by z.
//
// A team of 128 threads walks through time with kChannels channels: kLanes threads hold the states of one, kPer each. Tiles of
// kSteps positions arrive in the background, kStages - 1 tiles ahead; each tile is first turned into what every lane of a channel
// needs (dt and dt u; B and C in fp32: once instead of in each lane), then scanned, then gated and stored with wide writes. The
// states' recurrence is one multiply-add a step; the exponentials of four steps do not wait for it.
//
// This is the form for more than 16 states, float64, constant B or C, and for a scan beside an attention; what most calls are
// goes through forward_teams.cuh, to the same bits. Either is bound for N = 16 by the special-function unit (4 exponentials a
// lane and step, 8 cycles each for a warp, and about one more for softplus and gate: 40 cycles) and just as much by instruction
// issue (docs/cuda.md counts them); DRAM is at 40 % then.
//
// Where channels times batch cannot fill a device, time is split: a pass over the parts with zero states before them (`ends`), a
// pass that carries states over the parts, and this scan of every part from its own first state.
#pragma once

#include "ops/selective_scan/cuda/forward_scan.cuh"
#include "ops/selective_scan/cuda/forward_sides.cuh"
#include "ops/selective_scan/cuda/forward_states.cuh"

namespace fastlm::selective_scan::cuda {

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
  A* params = sums + Shape::kSumBytes / static_cast<int>(sizeof(A));
  load_channel_params<Shape>(team, call, s, params);

  const int channel = Shape::channel_of(team.thread), lane = Shape::lane_of(team.thread);
  A decay[kPer], h[kPer];
  first_states<Shape, kEnds>(call, s, channel, lane, decay, h);
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
    prepare_tile<Shape>(team, call, steps, raw, params, pairs, B, C);
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
      keep_chunk<Shape>(call, s, t0 + steps, channel, lane, h);
      team.sync();
      store_tile<Shape>(team, call, s, t0, steps, raw, params, sums);
      team.sync();  // the next tile's copies may write over this one
    }
    if (++stage == Shape::kStages) stage = 0;
  }
  fastlm::cuda::wait_copies<0>();

  if constexpr (kEnds) {
    part_states<Shape>(call, s, channel, lane, decay, total, h);
  } else {
    last_states<Shape>(call, s, channel, lane, h);
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
