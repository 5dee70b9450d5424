// Sliding-window attention on CUDA, decoding: m new tokens per row of the batch against a ring of keys and values, see
// ../update.h for how the work is cut. A block copies keys and values of a tile to shared memory, 16 bytes at a time and all at
// once, where every head of the group uses them; new tokens are turned on the way in and written to the ring by the block whose
// split they fall into (their slots hold no position that a query still sees, so nobody reads what is overwritten). Scores:
// 2^part_bits threads per key. Values: a thread owns a few columns of every row and a share of the keys. Bound by the memory of
// the caches.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/cuda/update.h"

namespace fastlm::sliding_window_attention::cuda {
namespace {

using fastlm::cuda::copy_async;
using fastlm::cuda::from_acc;
using fastlm::cuda::kFullWarp;
using fastlm::cuda::load_index;
using fastlm::cuda::load_param;
using fastlm::cuda::Team;
using fastlm::cuda::to_acc;

using UpdateTeam = Team<kUpdateThreads>;

template <class T>
constexpr int kVec = sizeof(T) == 2 ? 8 : 4;  // elements of a chunk

// kCount elements in the accumulation type, aligned to 8 or 16 bytes.
template <int kCount, class T>
__device__ __forceinline__ void load_values(const T* p, acc_t<T> (&x)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 4 == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      uint2 raw;
      if constexpr (kCount % 8 == 0) {  // both halves of one load of 16 bytes
        const uint4 all = *reinterpret_cast<const uint4*>(p + j / 8 * 8);
        raw = j % 8 == 0 ? make_uint2(all.x, all.y) : make_uint2(all.z, all.w);
      } else {
        raw = *reinterpret_cast<const uint2*>(p + j);
      }
      x[j] = to_acc(T{static_cast<uint16_t>(raw.x)});
      x[j + 1] = to_acc(T{static_cast<uint16_t>(raw.x >> 16)});
      x[j + 2] = to_acc(T{static_cast<uint16_t>(raw.y)});
      x[j + 3] = to_acc(T{static_cast<uint16_t>(raw.y >> 16)});
    }
  } else if constexpr (sizeof(T) == 4 && kCount % 4 == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const float4 raw = *reinterpret_cast<const float4*>(p + j);
      x[j] = raw.x, x[j + 1] = raw.y, x[j + 2] = raw.z, x[j + 3] = raw.w;
    }
  } else if constexpr (sizeof(T) == 8 && kCount % 2 == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      const double2 raw = *reinterpret_cast<const double2*>(p + j);
      x[j] = raw.x, x[j + 1] = raw.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = to_acc(p[j]);
  }
}

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

template <class T, class Rows>
__device__ __forceinline__ auto head_row(const Rows& rows, int64_t b, int64_t i, int64_t head) {
  const int64_t offset = b * rows.batch_stride + i * rows.seq_stride + head * rows.head_stride;
  if constexpr (std::is_const_v<std::remove_pointer_t<decltype(rows.ptr)>>) {
    return static_cast<const T*>(rows.ptr) + offset;
  } else {
    return static_cast<T*>(rows.ptr) + offset;
  }
}

// What the rows of a tile have so far, and what they see of the tile of keys at hand.
template <class A>
struct RowStats {
  A largest[kMaxTileRows], sum[kMaxTileRows], factor[kMaxTileRows];
  int first[kMaxTileRows], end[kMaxTileRows];
  int last_split;
};
static_assert(sizeof(RowStats<double>) <= kStatsBytes);

// An item: queries of one key head against one split. Numbers of positions count from the split's first one.
template <class A>
struct Item {
  int64_t seen;  // tokens before this call
  int64_t base;  // position that the split begins at
  int number, b, kv_head, row, splits;
  int count, fresh;  // positions of the split; from `fresh` on they are new
  int64_t slot;      // of the ring where the split begins
  A* q;              // shared memory: (rows, columns)
  A* scores;         // (keys of a tile, rows)
  RowStats<A>* stats;
};

template <class A>
__device__ __forceinline__ A negative_infinity() {
  return static_cast<A>(-__builtin_huge_val());
}

__device__ __forceinline__ int clip(int64_t x, int end) { return x < 0 ? 0 : x > end ? end : static_cast<int>(x); }

__device__ __forceinline__ int64_t first_visible(const UpdateParams& p, int64_t seen, int64_t t) {
  return max(max(seen + p.num_new - p.ring, seen + t - p.left), int64_t{0});
}

__device__ __forceinline__ int64_t tokens_seen(const UpdateParams& p, int64_t b) {
  const int64_t seen = load_index(p.device_seqlens, p.device_seqlens_64, b);
  return seen < 0 ? 0 : min(seen, int64_t{1} << 62);
}

// Element i of x turned by the angles of `position` (half-split pairs), or as it is.
template <class T>
__device__ __forceinline__ acc_t<T> turned(const UpdateParams& p, const T* x, int64_t position, int64_t i) {
  using A = acc_t<T>;
  if (p.rotary_cos == nullptr) return to_acc(x[i]);
  const int64_t half = p.head_dim / 2, angle = i < half ? i : i - half, at = min(position, p.rotary_rows - 1);
  const A cos = load_param<A>(p.rotary_cos, p.rotary_dtype, at * p.cos_row_stride + angle * p.cos_stride);
  const A sin = load_param<A>(p.rotary_sin, p.rotary_dtype, at * p.sin_row_stride + angle * p.sin_stride);
  const A a = to_acc(x[angle]), b = to_acc(x[angle + half]);
  return i < half ? a * cos - b * sin : b * cos + a * sin;
}

// The queries of the item, scaled for powers of 2; rows and columns beyond the end are 0.
template <class T, int kRows>
__device__ __forceinline__ void load_queries(const UpdateParams& p, const UpdatePlan& plan, const Item<acc_t<T>>& item,
                                             const UpdateTeam& team) {
  using A = acc_t<T>;
  const int columns = plan.chunks * kVec<T>;
  const A scale = static_cast<A>(p.softmax_scale * 1.4426950408889634);
  for (int r = 0; r < kRows; ++r) {
    const int row = item.row + r, t = row < plan.rows ? row / plan.group : 0;
    const T* q = row < plan.rows ? head_row<T>(p.q, item.b, t, item.kv_head * plan.group + row - t * plan.group) : nullptr;
    for (int i = team.thread; i < columns; i += kUpdateThreads) {
      item.q[r * columns + i] = q == nullptr || i >= p.head_dim ? A(0) : turned(p, q, item.seen + t, i) * scale;
    }
  }
}

// Keys or values of positions [at, at + count) of the split, as far as they are in the ring; starts the copies.
template <class T>
__device__ __forceinline__ void copy_cached(const UpdateParams& p, const UpdatePlan& plan, const MutableHeadRows& cache,
                                            const Item<acc_t<T>>& item, int at, T* tile, const UpdateTeam& team) {
  const int cached = min(min(item.count, item.fresh) - at, plan.positions);
  const T* from = head_row<T>(cache, item.b, 0, item.kv_head);
  constexpr int kPiece = 16 / sizeof(T);
  const int head_dim = static_cast<int>(p.head_dim);
  const int lane = team.thread & (plan.chunk_lanes - 1), step = kUpdateThreads / plan.chunk_lanes;
  for (int key = team.thread / plan.chunk_lanes; key < cached; key += step) {
    const int64_t slot = item.slot + at + key;
    const T* row = from + (slot < p.ring ? slot : slot - p.ring) * cache.seq_stride;
    T* to = tile + key * plan.row_stride;
    if (plan.vector) {
      for (int i = lane * kPiece; i < head_dim; i += plan.chunk_lanes * kPiece) copy_async<16>(to + i, row + i);
    } else {
      for (int i = lane; i < plan.chunks * kVec<T>; i += plan.chunk_lanes) to[i] = i < head_dim ? row[i] : from_acc<T>(0);
    }
  }
  fastlm::cuda::commit_copies();
}

// Those that are new: into the tile and, by the first tile of rows, into the ring.
template <class T, bool kTurn>
__device__ __forceinline__ void take_new(const UpdateParams& p, const UpdatePlan& plan, const ConstHeadRows& fresh,
                                         const MutableHeadRows& cache, const Item<acc_t<T>>& item, int at, T* tile,
                                         const UpdateTeam& team) {
  const int end = min(item.count - at, plan.positions);
  for (int key = max(item.fresh - at, 0); key < end; ++key) {
    const int64_t position = item.base + at + key;
    const T* x = head_row<T>(fresh, item.b, position - item.seen, item.kv_head);
    T* ring = head_row<T>(cache, item.b, position % p.ring, item.kv_head);
    for (int i = team.thread; i < plan.chunks * kVec<T>; i += kUpdateThreads) {
      T value = from_acc<T>(0);
      if (i < p.head_dim) {
        value = kTurn && p.rotary_cos != nullptr ? from_acc<T>(turned(p, x, position, i)) : x[i];
        if (item.row == 0) ring[i] = value;
      }
      tile[key * plan.row_stride + i] = value;
    }
  }
}

// scores[key][row] of the tile; -inf where a row does not see a key.
template <class T, int kRows>
__device__ __forceinline__ void score(const UpdatePlan& plan, const Item<acc_t<T>>& item, const T* keys, int count,
                                      const UpdateTeam& team) {
  using A = acc_t<T>;
  const int parts = 1 << plan.part_bits, key = team.thread >> plan.part_bits, part = team.thread & (parts - 1);
  const int columns = plan.chunks * kVec<T>;
  A sum[kRows] = {};
  if (key < count) {
#pragma unroll 2
    for (int c = part; c < plan.chunks; c += parts) {
      A k[kVec<T>];
      load_values(keys + key * plan.row_stride + c * kVec<T>, k);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        A q[kVec<T>];
        load_values(item.q + r * columns + c * kVec<T>, q);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) sum[r] += q[i] * k[i];
      }
    }
  }
  for (int distance = parts / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += __shfl_xor_sync(kFullWarp, sum[r], distance);
  }
  if (part != 0) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool visible = key >= item.stats->first[r] && key < item.stats->end[r];
    item.scores[key * kRows + r] = visible ? sum[r] : negative_infinity<A>();
  }
}

// Scores become weights, a warp for each row; largest score and sum of weights of the row are carried on.
template <class A, int kRows>
__device__ __forceinline__ void weigh(const UpdatePlan& plan, const Item<A>& item, const UpdateTeam& team) {
  const int lane = team.thread % 32;
  for (int r = team.thread / 32; r < kRows; r += kUpdateThreads / 32) {
    A largest = item.stats->largest[r];
    const A before = largest;
    for (int key = lane; key < plan.positions; key += 32) largest = max(largest, item.scores[key * kRows + r]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    const A base = largest == negative_infinity<A>() ? A(0) : largest;
    A sum = 0;
    for (int key = lane; key < plan.positions; key += 32) {
      const A weight = exp2_of(item.scores[key * kRows + r] - base);
      item.scores[key * kRows + r] = weight;
      sum += weight;
    }
    sum = fastlm::cuda::warp_sum(sum);
    if (lane == 0) {
      const A factor = exp2_of(before - base);
      item.stats->largest[r] = largest;
      item.stats->factor[r] = factor;
      item.stats->sum[r] = item.stats->sum[r] * factor + sum;
    }
  }
}

template <class T, int kRows>
constexpr int kOwned = update_columns(sizeof(T), kRows);  // columns of every row in a thread's registers

// out[r][i] += sum over this thread's keys of weight times value. kAll: every row sees every key; else values that a row does not
// see must not touch it, not even as NaN.
template <class T, int kRows, bool kAll>
__device__ __forceinline__ void add_values(const UpdatePlan& plan, const Item<acc_t<T>>& item, const T* values, int count,
                                           acc_t<T> (&out)[kRows][kOwned<T, kRows>], const UpdateTeam& team) {
  using A = acc_t<T>;
  constexpr int kColumns = kOwned<T, kRows>;
  const int column = (team.thread & (plan.value_lanes - 1)) * kColumns, step = kUpdateThreads / plan.value_lanes;
  if (column >= plan.chunks * kVec<T>) return;
#pragma unroll 2
  for (int key = team.thread / plan.value_lanes; key < count; key += step) {
    A v[kColumns], weight[kRows];
    load_values(values + key * plan.row_stride + column, v);
    load_values(item.scores + key * kRows, weight);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!kAll && (key < item.stats->first[r] || key >= item.stats->end[r])) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) out[r][i] += weight[r] * v[i];
    }
  }
}

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
