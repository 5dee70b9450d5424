// Sliding-window attention on CUDA, decoding: m new tokens per row of the batch against a ring of keys and values, see update.h
// for how the work is cut. A block goes through the tiles of its split; the last of the splits to be done adds all of them up, in
// order of their numbers. Bound by the memory of the caches, each byte of which is read once.
#pragma once

#include "ops/sliding_window_attention/cuda/update_tile.cuh"

namespace fastlm::sliding_window_attention::cuda {
namespace {

// Parts of the threads, laid side by side over keys and values: `slots` rows of sums for every row.
template <class T, int kRows>
__device__ __forceinline__ int spread_sums(const UpdatePlan& plan, acc_t<T> (&out)[kRows][kOwned<T, kRows>], acc_t<T>* sums,
                                           const UpdateTeam& team) {
  constexpr int kColumns = kOwned<T, kRows>;
  const int column = (team.thread & (plan.value_lanes - 1)) * kColumns, columns = plan.chunks * kVec<T>;
  for (int distance = plan.value_lanes; distance < 32; distance *= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) out[r][i] += __shfl_xor_sync(kFullWarp, out[r][i], distance);
    }
  }
  const int slot_threads = plan.value_lanes > 32 ? plan.value_lanes : 32;
  if (column < columns && team.thread % slot_threads < plan.value_lanes) {
    auto* to = sums + (team.thread / slot_threads * kRows) * columns + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) to[r * columns + i] = out[r][i];
    }
  }
  return kUpdateThreads / slot_threads;
}

template <class T>
__device__ __forceinline__ T* out_row(const UpdateParams& p, const UpdatePlan& plan, const Item<acc_t<T>>& item, int row) {
  const int t = row / plan.group;
  return head_row<T>(p.out, item.b, t, item.kv_head * plan.group + row - t * plan.group);
}

// Adds up the splits of the item's rows, in order. Called by the whole team once all of them are written.
template <class T, int kRows>
__device__ __forceinline__ void merge_splits(const UpdateParams& p, const UpdatePlan& plan, const UpdateWorkspace& w,
                                             const Item<acc_t<T>>& item, acc_t<T>* factors, const UpdateTeam& team) {
  using A = acc_t<T>;
  const int splits = item.splits, lane = team.thread % 32, head_dim = static_cast<int>(p.head_dim);
  const int64_t first = item.number / plan.splits * plan.splits;  // numbers of the splits of the same rows follow each other
  const A* stats = static_cast<const A*>(w.stats) + first * kRows * 2;
  const A* const sums = static_cast<const A*>(w.sums) + first * kRows * p.head_dim;
  A* const inverse = factors + kRows * splits;
  for (int r = team.thread / 32; r < kRows; r += kUpdateThreads / 32) {
    A largest = negative_infinity<A>();
    for (int i = lane; i < splits; i += 32) largest = max(largest, stats[(i * kRows + r) * 2]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    const A base = largest == negative_infinity<A>() ? A(0) : largest;
    A total = 0;
    for (int i = lane; i < splits; i += 32) {
      const A factor = exp2_of(stats[(i * kRows + r) * 2] - base);
      factors[r * splits + i] = factor;
      total += factor * stats[(i * kRows + r) * 2 + 1];
    }
    total = fastlm::cuda::warp_sum(total);
    if (lane == 0) inverse[r] = total == A(0) ? A(0) : A(1) / total;
  }
  team.sync();
  const int rows = clip(plan.rows - item.row, kRows);
  for (int r = 0; r < rows; ++r) {
    T* const out = out_row<T>(p, plan, item, item.row + r);
    for (int n = team.thread; n < head_dim; n += kUpdateThreads) {
      const A* part = sums + r * head_dim + n;
      A sum = 0;
#pragma unroll 8
      for (int i = 0; i < splits; ++i, part += kRows * head_dim) sum += factors[r * splits + i] * *part;
      out[n] = from_acc<T>(sum * inverse[r]);
    }
  }
}

// Writes what the item's split came to; the last split of all merges them.
template <class T, int kRows>
__device__ __forceinline__ void finish(const UpdateParams& p, const UpdatePlan& plan, const UpdateWorkspace& w,
                                       const Item<acc_t<T>>& item, acc_t<T> (&out)[kRows][kOwned<T, kRows>], acc_t<T>* over_tiles,
                                       const UpdateTeam& team) {
  using A = acc_t<T>;
  const int columns = plan.chunks * kVec<T>, head_dim = static_cast<int>(p.head_dim);
  team.sync();  // keys and values are used
  const int slots = spread_sums<T, kRows>(plan, out, over_tiles, team);
  team.sync();
  for (int r = 0; r < kRows; ++r) {
    if (item.row + r >= plan.rows) break;
    const A total = item.stats->sum[r];
    const A inverse = total == A(0) ? A(0) : A(1) / total;
    T* const to = out_row<T>(p, plan, item, item.row + r);
    A* const part = static_cast<A*>(w.sums) + (int64_t{item.number} * kRows + r) * p.head_dim;
    for (int n = team.thread; n < head_dim; n += kUpdateThreads) {
      A sum = 0;
      for (int s = 0; s < slots; ++s) sum += over_tiles[(s * kRows + r) * columns + n];
      if (item.splits == 1) {
        to[n] = from_acc<T>(sum * inverse);
      } else {
        part[n] = sum;
      }
    }
  }
  if (item.splits == 1) return;
  if (team.thread < kRows) {
    A* const stats = static_cast<A*>(w.stats) + (int64_t{item.number} * kRows + team.thread) * 2;
    stats[0] = item.stats->largest[team.thread];
    stats[1] = item.stats->sum[team.thread];
  }
  team.sync();
  if (team.thread == 0) {
    int32_t* const counter = w.counters + item.number / plan.splits;
    __threadfence();  // what the team wrote comes before its arrival, and the arrivals of the others before what is read
    const bool last = atomicAdd(counter, 1) + 1 == item.splits;
    if (last) *counter = 0;
    __threadfence();
    item.stats->last_split = last ? 1 : 0;
  }
  team.sync();
  if (item.stats->last_split != 0) merge_splits<T, kRows>(p, plan, w, item, over_tiles, team);
}

// One item. Ends with a barrier of the team, so that the next may follow.
template <class T, int kRows>
__device__ __forceinline__ void update_item(const UpdateParams& p, const UpdatePlan& plan, const UpdateWorkspace& w, int number,
                                            const UpdateTeam& team, char* shared) {
  using A = acc_t<T>;
  Item<A> item;
  item.number = number;
  const int rows_number = number / plan.splits, head_number = rows_number / plan.row_tiles;
  const int kv_heads = static_cast<int>(p.num_kv_heads);
  item.b = head_number / kv_heads;
  item.kv_head = head_number - item.b * kv_heads;
  item.row = (rows_number - head_number * plan.row_tiles) * kRows;
  item.seen = tokens_seen(p, item.b);
  const int64_t begin = int64_t{number - rows_number * plan.splits} * plan.split_positions;
  const int64_t oldest = first_visible(p, item.seen, 0), visible = item.seen + p.num_new - oldest;
  if (begin >= visible) return;
  item.base = oldest + begin;
  item.count = static_cast<int>(min(visible - begin, int64_t{plan.split_positions}));
  item.splits = static_cast<int>((visible + plan.split_positions - 1) / plan.split_positions);
  item.fresh = clip(item.seen - item.base, item.count);
  item.slot = item.base % p.ring;
  item.q = reinterpret_cast<A*>(shared);
  item.scores = reinterpret_cast<A*>(shared + plan.scores);
  item.stats = reinterpret_cast<RowStats<A>*>(shared + plan.stats);
  T* const keys = reinterpret_cast<T*>(shared + plan.keys);
  T* const values = reinterpret_cast<T*>(shared + plan.values);

  copy_cached<T>(p, plan, p.k_cache, item, 0, keys, team);
  copy_cached<T>(p, plan, p.v_cache, item, 0, values, team);
  load_queries<T, kRows>(p, plan, item, team);
  if (team.thread < kRows) {
    item.stats->largest[team.thread] = negative_infinity<A>();
    item.stats->sum[team.thread] = A(0);
  }
  A out[kRows][kOwned<T, kRows>] = {};
  for (int at = 0; at < item.count; at += plan.positions) {
    const int count = min(item.count - at, plan.positions);
    take_new<T, true>(p, plan, p.k, p.k_cache, item, at, keys, team);
    take_new<T, false>(p, plan, p.v, p.v_cache, item, at, values, team);
    if (team.thread < kRows) {
      const int row = item.row + team.thread;
      const int64_t t = row / max(plan.group, 1);
      const int64_t tile = item.base + at;
      const bool real = row < plan.rows;
      item.stats->first[team.thread] = real ? clip(first_visible(p, item.seen, t) - tile, count) : 0;
      item.stats->end[team.thread] = real ? clip(item.seen + t + 1 - tile, count) : count;
    }
    fastlm::cuda::wait_copies<1>();  // the keys; values may be under way
    team.sync();
    score<T, kRows>(plan, item, keys, count, team);
    team.sync();
    const int next = at + plan.positions;
    if (next < item.count) copy_cached<T>(p, plan, p.k_cache, item, next, keys, team);
    weigh<A, kRows>(plan, item, team);
    if (next < item.count) {
      fastlm::cuda::wait_copies<1>();
    } else {
      fastlm::cuda::wait_copies<0>();
    }
    team.sync();
    bool all = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      all = all && item.stats->first[r] == 0 && item.stats->end[r] == count;
      const A factor = item.stats->factor[r];
#pragma unroll
      for (int i = 0; i < kOwned<T, kRows>; ++i) out[r][i] *= factor;
    }
    if (all) {
      add_values<T, kRows, true>(plan, item, values, count, out, team);
    } else {
      add_values<T, kRows, false>(plan, item, values, count, out, team);
    }
    if (next < item.count) {
      team.sync();
      copy_cached<T>(p, plan, p.v_cache, item, next, values, team);
    }
  }
  finish<T, kRows>(p, plan, w, item, out, reinterpret_cast<A*>(keys), team);
  team.sync();
}

template <class T, int kRows>
__global__ void __launch_bounds__(kUpdateThreads, kRows == kMaxTileRows ? 4 : 5)
    update(const __grid_constant__ UpdateParams p, const __grid_constant__ UpdatePlan plan,
           const __grid_constant__ UpdateWorkspace w) {
  const UpdateTeam team{static_cast<int>(threadIdx.x), 1};
  update_item<T, kRows>(p, plan, w, static_cast<int>(blockIdx.x), team, fastlm::cuda::shared_memory());
}

}  // namespace
}  // namespace fastlm::sliding_window_attention::cuda
