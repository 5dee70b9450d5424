// Sliding-window attention on CUDA, decoding: one tile of keys and values. They are copied to shared memory, 16 bytes at a time
// and all at once, where every head of the group uses them; new tokens are turned on the way in and written to the ring by the
// block whose split they fall into (their slots hold no position that a query still sees, so nobody reads what is overwritten).
// Scores: 2^part_bits threads per key. Values: a thread owns a few columns of every row and a share of the keys.
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

}  // namespace
}  // namespace fastlm::sliding_window_attention::cuda
