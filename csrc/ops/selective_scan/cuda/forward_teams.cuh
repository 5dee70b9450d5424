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

#include "ops/selective_scan/cuda/forward_rows.cuh"
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

// How a stretch is cut: whole tiles, and what is left.
template <class Shape>
struct Tiles {
  int whole, rest, count;
  __device__ __forceinline__ explicit Tiles(const Stretch& s)
      : whole(static_cast<int>((s.end - s.begin) / Shape::kSteps)),
        rest(static_cast<int>((s.end - s.begin) % Shape::kSteps)),
        count(whole + (rest != 0)) {}
};

template <class Shape>
__device__ __forceinline__ void scan_side(const ForwardCall& call, const Stretch& s, int thread,
                                          const TeamsShared<Shape>& shared) {
  using A = typename Shape::A;
  using Scan = ScanAhead<Shape>;
  constexpr int kThreads = Shape::kBlockThreads, kGroups = Shape::kSteps / 4, kChunkTiles = kChunk / Shape::kSteps;
  const int channel = Shape::channel_of(thread), lane = Shape::lane_of(thread);
  A decay[Shape::kPer], h[Shape::kPer];
  first_states<Shape, false>(call, s, channel, lane, decay, h);
  ChunkStates<Shape> chunks(call, s, channel, lane);
  const Tiles<Shape> tiles(s);

  const int own_pair = channel * 2, own_state = lane * Shape::kPer, own_sum = lane * Shape::kSumStride + channel;
  Scan scan{decay, {}, {}, {}, {}};
  if (tiles.count > 0) {
    wait_for<kPrepared, kThreads>(0);
    A* pairs = shared.pairs(0);
    scan.begin(pairs + own_pair, shared.B(pairs) + own_state);
  }
  int tile = 0;
#pragma unroll 1
  for (; tile < tiles.whole; ++tile) {
    A* pairs = shared.pairs(tile);
    const A *pair = pairs + own_pair, *b_row = shared.B(pairs) + own_state, *c_row = shared.C(pairs) + own_state;
    A* sum = shared.sums(tile) + own_sum;
    if (tile >= 2) wait_for<kStored, kThreads>(tile);
#pragma unroll 2
    for (int i = 0; i < kGroups - 2; ++i) {
      *sum = scan.template advance<true>(c_row, b_row + Scan::kStateGroup, pair + 2 * Scan::kPairGroup, lane, h);
      pair += Scan::kPairGroup, b_row += Scan::kStateGroup, c_row += Scan::kStateGroup, sum += Scan::kSumGroup;
    }
    const bool more = tile + 1 < tiles.count;
    if (more) wait_for<kPrepared, kThreads>(tile + 1);
    const A* next = shared.pairs(more ? tile + 1 : tile);  // after the last one: what nobody takes
    const A *next_pair = next + own_pair, *next_b = next + Shape::kStepBytes / sizeof(A) + own_state;
    sum[0] = scan.template advance<true>(c_row, b_row + Scan::kStateGroup, next_pair, lane, h);
    sum[Scan::kSumGroup] = scan.template advance<true>(c_row + Scan::kStateGroup, next_b, next_pair + Scan::kPairGroup, lane, h);
    hand_over<kScanned, kThreads>(tile);
    if (tile % kChunkTiles == kChunkTiles - 1) chunks.keep(call, h);
  }
  if (tiles.rest != 0) {
    A* pairs = shared.pairs(tile);
    const A *pair = pairs + own_pair, *b_row = shared.B(pairs) + own_state, *c_row = shared.C(pairs) + own_state;
    A* sum = shared.sums(tile) + own_sum;
    if (tile >= 2) wait_for<kStored, kThreads>(tile);
#pragma unroll 1
    for (int t4 = 0; t4 < tiles.rest; t4 += 4) {
      const int next = (t4 + 4) % Shape::kSteps, after = (t4 + 8) % Shape::kSteps;
      *sum = scan.template advance<true>(c_row + t4 * Shape::kStates, b_row + next * Shape::kStates,
                                         pair + after * Shape::kChannels * 2, lane, h);
      sum += Scan::kSumGroup;
    }
    hand_over<kScanned, kThreads>(tile);
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
  RowTiles<Shape> rows(call, s, movers, thread);
  const Tiles<Shape> tiles(s);
  const int in_rows = movers.apply && RowTiles<Shape>::applies(call, s) ? tiles.whole : 0;
  const auto start_of = [&](int tile) { return s.begin + static_cast<int64_t>(tile) * kSteps; };
  const auto steps_of = [&](int tile) { return tile < tiles.whole ? kSteps : tiles.rest; };
  const auto fetch = [&](int tile) {
    char* to = shared.raw(tile);
    if (tile < in_rows) {
      rows.copy(call, to);
    } else if (movers.apply && tile < tiles.whole) {
      movers.copy(call, s, to, thread);
      fastlm::cuda::commit_copies();
    } else {
      stage_tile<Shape>(team, call, s, start_of(tile), to);
    }
  };
  if (tiles.count > 0) fetch(0);
#pragma unroll 1
  for (int tile = 0; tile < (tiles.count > 0 ? tiles.count + 2 : 0); ++tile) {
    const int before = tile - 2;
    if (before >= 0) wait_for<kScanned, kThreads>(tile);
    if (tile < tiles.count) {
      fastlm::cuda::wait_copies<0>();
      team.sync();  // everybody's copies are there, and the slot of tile - 3 was read
      fetch(tile + 1);
      const char* raw = shared.raw(tile);
      A *pairs = shared.pairs(tile), *B = shared.B(pairs), *C = shared.C(pairs);
      if (tile < in_rows) {
        rows.prepare(call, raw, params, pairs, B, C);
      } else {
        prepare_tile<Shape>(team, call, steps_of(tile), raw, params, pairs, B, C);
      }
      hand_over<kPrepared, kThreads>(tile);
    }
    if (before >= 0) {
      if (before < in_rows) {
        rows.store(call, shared.raw(before), params, shared.sums(before));
      } else {
        store_tile<Shape>(team, call, s, start_of(before), steps_of(before), shared.raw(before), params, shared.sums(before));
      }
      if (tile < tiles.count) hand_over<kStored, kThreads>(tile);
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
  const auto each = [&](const auto& side) {
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const Stretch s = stretch_of<Shape>(call, item);
      if (s.number >= 0) side(s);
      if (item + gridDim.x < items) __syncthreads();
    }
  };
  if (scans) {
    each([&](const Stretch& s) { scan_side<Shape>(call, s, thread, shared); });
  } else {
    each([&](const Stretch& s) { other_side<Shape>(call, s, thread, shared); });
  }
}

}  // namespace fastlm::selective_scan::cuda
