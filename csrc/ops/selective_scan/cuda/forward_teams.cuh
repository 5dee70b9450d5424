// The forward scan on CUDA with two teams of 128 threads to a block: one does nothing but the recurrence, the other everything
// else (copies, preparing tile i + 1, gating and storing tile i - 1), so that a scheduler has work while either waits. For N up
// to 16 where B and C have a value for each position; arithmetic and results are those of forward.cuh.
//
// Tiles go around four slots of copies, two sets of prepared steps and two of sums. They are handed over by named barriers, two
// of each kind for even and odd tiles, on which one team arrives and the other waits:
//   prepared: steps, B and C of the tile are there
//   scanned: its sums are there, and its set of steps is free
//   stored: its set of sums is free
// The recurrence runs on over the ends of tiles: the first groups of the next one are read before the last of this one.
#pragma once

#include "ops/selective_scan/cuda/forward_scan.cuh"
#include "ops/selective_scan/cuda/forward_sides.cuh"
#include "ops/selective_scan/cuda/forward_states.cuh"

namespace fastlm::selective_scan::cuda {

template <class T>
struct TeamsShape : ForwardShape<T, 4, 4, sizeof(T) == 2 ? 32 : 16, 4> {
  using Base = ForwardShape<T, 4, 4, sizeof(T) == 2 ? 32 : 16, 4>;
  static constexpr int kBlockThreads = 2 * Base::kThreads;
  static constexpr int kSharedBytes = 4 * Base::kRawBytes + 2 * (Base::kPreparedBytes + Base::kSumBytes) + Base::kParamBytes;
};

// Where what lies. Tile numbers count from the start of the stretch.
template <class Shape>
struct TeamsShared {
  using A = typename Shape::A;
  char* base;
  __device__ __forceinline__ char* raw(int tile) const { return base + tile % 4 * Shape::kRawBytes; }
  __device__ __forceinline__ A* pairs(int tile) const {
    return reinterpret_cast<A*>(base + 4 * Shape::kRawBytes + tile % 2 * Shape::kPreparedBytes);
  }
  static __device__ __forceinline__ A* B(A* pairs) { return pairs + Shape::kStepBytes / static_cast<int>(sizeof(A)); }
  static __device__ __forceinline__ A* C(A* pairs) { return B(pairs) + Shape::kSteps * Shape::kStates; }
  __device__ __forceinline__ A* sums(int tile) const {
    return reinterpret_cast<A*>(base + 4 * Shape::kRawBytes + 2 * Shape::kPreparedBytes + tile % 2 * Shape::kSumBytes);
  }
  __device__ __forceinline__ A* params() const {
    return reinterpret_cast<A*>(base + 4 * Shape::kRawBytes + 2 * (Shape::kPreparedBytes + Shape::kSumBytes));
  }
};

constexpr int kSidesBarrier = 1, kPrepared = 2, kScanned = 4, kStored = 6;  // the last three: and the next number for odd tiles

template <int kKind, int kThreads>
__device__ __forceinline__ void hand_over(int tile) {
  tile % 2 == 0 ? fastlm::cuda::arrive_named(kKind, kThreads) : fastlm::cuda::arrive_named(kKind + 1, kThreads);
}
template <int kKind, int kThreads>
__device__ __forceinline__ void wait_for(int tile) {
  tile % 2 == 0 ? fastlm::cuda::sync_named(kKind, kThreads) : fastlm::cuda::sync_named(kKind + 1, kThreads);
}

template <class Shape>
__device__ __forceinline__ void scan_side(const ForwardCall& call, const Stretch& s, int thread,
                                          const TeamsShared<Shape>& shared) {
  using A = typename Shape::A;
  using Scan = ScanAhead<Shape>;
  constexpr int kThreads = Shape::kBlockThreads, kSteps = Shape::kSteps;
  const int channel = Shape::channel_of(thread), lane = Shape::lane_of(thread);
  A decay[Shape::kPer], h[Shape::kPer];
  first_states<Shape, false>(call, s, channel, lane, decay, h);

  const int own_pair = channel * 2, own_state = lane * Shape::kPer, own_sum = lane * Shape::kSumStride + channel;
  Scan scan{decay, {}, {}, {}, {}};
  if (s.begin < s.end) {
    wait_for<kPrepared, kThreads>(0);
    A* pairs = shared.pairs(0);
    scan.begin(pairs + own_pair, shared.B(pairs) + own_state);
  }
  int tile = 0;
#pragma unroll 1
  for (int64_t t0 = s.begin; t0 < s.end; t0 += kSteps, ++tile) {
    const int groups = static_cast<int>(ceil_div(min_of(kSteps, s.end - t0), 4));
    const bool more = t0 + kSteps < s.end;
    A *pairs = shared.pairs(tile), *next_pairs = shared.pairs(more ? tile + 1 : tile);
    const A *pair = pairs + own_pair, *b_row = shared.B(pairs) + own_state, *c_row = shared.C(pairs) + own_state;
    A* sum = shared.sums(tile) + own_sum;
    if (tile >= 2) wait_for<kStored, kThreads>(tile);
#pragma unroll 2
    for (int g = 2; g < groups; ++g) {
      *sum = scan.template advance<true>(c_row, b_row + Scan::kStateGroup, pair + 2 * Scan::kPairGroup, lane, h);
      pair += Scan::kPairGroup, b_row += Scan::kStateGroup, c_row += Scan::kStateGroup, sum += Scan::kSumGroup;
    }
    if (more) wait_for<kPrepared, kThreads>(tile + 1);
    // After the last tile: its own first groups, which nobody takes.
    const A *next_pair = next_pairs + own_pair, *next_b = shared.B(next_pairs) + own_state;
    if (groups > 1) {
      *sum = scan.template advance<true>(c_row, b_row + Scan::kStateGroup, next_pair, lane, h);
      c_row += Scan::kStateGroup, sum += Scan::kSumGroup;
    }
    *sum = scan.template advance<true>(c_row, next_b, next_pair + Scan::kPairGroup, lane, h);
    hand_over<kScanned, kThreads>(tile);
    keep_chunk<Shape>(call, s, min_of(t0 + kSteps, s.end), channel, lane, h);
  }
  last_states<Shape>(call, s, channel, lane, h);
}

template <class Shape>
__device__ __forceinline__ void other_side(const ForwardCall& call, const Stretch& s, int thread,
                                           const TeamsShared<Shape>& shared) {
  using A = typename Shape::A;
  constexpr int kThreads = Shape::kBlockThreads, kSteps = Shape::kSteps;
  const Team<128> team{thread, kSidesBarrier};
  A* params = shared.params();
  load_channel_params<Shape>(team, call, s, params);
  TileMovers<Shape> movers(call, s, thread);
  const int tiles = static_cast<int>(ceil_div(s.end - s.begin, kSteps));
  const auto fetch = [&](int tile) {
    const int64_t t0 = s.begin + static_cast<int64_t>(tile) * kSteps;
    if (movers.apply && t0 + kSteps <= s.end) {
      movers.copy(call, s, shared.raw(tile), thread);
      fastlm::cuda::commit_copies();
    } else {
      stage_tile<Shape>(team, call, s, t0, shared.raw(tile));
    }
  };
  const auto steps_of = [&](int tile) {
    return static_cast<int>(min_of(kSteps, s.end - s.begin - static_cast<int64_t>(tile) * kSteps));
  };
  if (tiles > 0) fetch(0);
#pragma unroll 1
  for (int tile = 0; tile < (tiles > 0 ? tiles + 2 : 0); ++tile) {
    const int before = tile - 2;
    if (before >= 0) wait_for<kScanned, kThreads>(tile);
    if (tile < tiles) {
      fastlm::cuda::wait_copies<0>();
      team.sync();  // everybody's copies are there, and the slot of tile - 3 was read
      fetch(tile + 1);
      A* pairs = shared.pairs(tile);
      prepare_tile<Shape>(team, call, steps_of(tile), shared.raw(tile), params, pairs, shared.B(pairs), shared.C(pairs));
      hand_over<kPrepared, kThreads>(tile);
    }
    if (before >= 0) {
      store_tile<Shape>(team, call, s, s.begin + static_cast<int64_t>(before) * kSteps, steps_of(before), shared.raw(before),
                        params, shared.sums(before));
      if (tile < tiles) hand_over<kStored, kThreads>(tile);
    }
  }
  fastlm::cuda::wait_copies<0>();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kBlockThreads, 2)
    forward_teams_kernel(const __grid_constant__ ForwardCall call, int64_t items) {
  const TeamsShared<Shape> shared{fastlm::cuda::shared_memory()};
  const int thread = static_cast<int>(threadIdx.x) % Shape::kThreads;
  const bool scans = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / Shape::kThreads, 0) == 0;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Stretch s = stretch_of<Shape>(call, item);
    if (s.number >= 0) {
      if (scans) {
        scan_side<Shape>(call, s, thread, shared);
      } else {
        other_side<Shape>(call, s, thread, shared);
      }
    }
    if (item + gridDim.x < items) __syncthreads();
  }
}

}  // namespace fastlm::selective_scan::cuda
