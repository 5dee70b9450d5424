// How the CUDA kernel of sliding_window_attention_update cuts its work, the memory it needs, and its launch. Torch-free.
//
// A block takes one item: up to kTileRows queries of one key head ("rows": m tokens times the heads of the group) against one
// split of the keys they see. The last split of an item's rows to be done merges all of them, in order of their numbers. The cut
// follows from shapes alone, so that a row's bits depend on nothing but the row.
#pragma once

#include <cuda_runtime_api.h>

#include "core/integers.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

constexpr int kUpdateThreads = 128;
constexpr int kMaxTileRows = 8;
constexpr int64_t kMaxSplits = 64;         // so that factors of all splits fit where keys lay
constexpr int64_t kTileBytes = 72 * 1024;  // of keys and values in shared memory at once, at most: 64 bf16 keys of 256, padded
constexpr int kMaxPositions = 64, kMinPositions = 8;
constexpr int kStatsBytes = 272;  // RowStats

struct UpdatePlan {
  int64_t rows, items;          // queries of a key head; pieces of work of the call
  int row_tiles, group;         // tiles of rows; query heads of a key head
  int tile_rows;                // 1, 4 or 8
  int positions;                // keys of a tile in shared memory: 64, 32, 16 or 8
  int splits, split_positions;  // splits; positions of one, a multiple of `positions`
  int chunks;                   // of a head, kVec elements each, the last one padded
  int chunk_lanes;              // power of two that covers them: threads side by side on a copy
  int value_lanes;              // the same for what a thread adds up of a value: update_columns
  int part_bits;                // 2^part_bits threads share a key
  int row_stride;               // elements between keys in shared memory
  bool vector;                  // caches may be read 16 bytes at a time
  // Shared memory: bytes to each part, and in all.
  int scores, stats, keys, values, shared_bytes;
};

struct UpdateWorkspace {
  void* sums;         // (key heads, row tiles, splits, tile rows, K), accumulation type
  void* stats;        // (key heads, row tiles, splits, tile rows, 2): largest score, sum of weights
  int32_t* counters;  // (key heads, row tiles), zero before and after a launch
};

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

template <class Rows>
bool is_vector(const Rows& rows, int64_t bytes) {
  const auto aligned = [](int64_t x) { return x % 16 == 0; };
  return aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.ptr))) && aligned(rows.batch_stride * bytes) &&
         aligned(rows.seq_stride * bytes) && aligned(rows.head_stride * bytes);
}

// Columns of each row that a thread adds up: half a chunk where the rows are many, as all of its sums lie in registers.
constexpr int update_columns(int64_t bytes, int rows) { return bytes == 2 && rows < kMaxTileRows ? 8 : 4; }

inline UpdatePlan plan_update(const UpdateParams& p, DType dtype) {
  const int64_t bytes = element_bytes(dtype), acc = dtype == DType::kFloat64 ? 8 : 4, vec = bytes == 2 ? 8 : 4;
  UpdatePlan plan{};
  plan.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  plan.rows = p.num_new * plan.group;
  plan.tile_rows = dtype == DType::kFloat64 || (plan.rows > 1 && plan.rows <= 4) ? 4 : plan.rows <= 1 ? 1 : kMaxTileRows;
  plan.row_tiles = static_cast<int>(max_of(1, ceil_div(plan.rows, plan.tile_rows)));
  plan.chunks = static_cast<int>(ceil_div(p.head_dim, vec));
  plan.chunk_lanes = 8;
  while (plan.chunk_lanes < plan.chunks) plan.chunk_lanes *= 2;
  const int64_t owned = update_columns(bytes, plan.tile_rows);
  plan.value_lanes = 8;
  while (plan.value_lanes * owned < p.head_dim) plan.value_lanes *= 2;
  plan.vector = p.head_dim % vec == 0 && is_vector(p.k_cache, bytes) && is_vector(p.v_cache, bytes);

  // Threads that read keys at once start at different banks: a row is as many 16-byte pieces beyond a multiple of 8 as threads
  // share a key.
  const int64_t pieces = plan.chunks * vec * bytes / 16, per_chunk = vec * bytes / 16;
  int64_t row_pieces = 0;
  for (plan.positions = kMaxPositions;; plan.positions /= 2) {
    const int64_t parts = kUpdateThreads / plan.positions;
    row_pieces = pieces;
    while ((row_pieces - parts * per_chunk) % 8 != 0) ++row_pieces;
    if (plan.positions == kMinPositions || 2 * plan.positions * row_pieces * 16 <= kTileBytes) break;
  }
  while ((plan.positions << plan.part_bits) < kUpdateThreads) ++plan.part_bits;
  plan.row_stride = static_cast<int>(row_pieces * 16 / bytes);

  const int64_t held = min_of(p.left + p.num_new, p.ring);
  const int64_t least = plan.tile_rows == kMaxTileRows ? 2 : 1;  // more rows write more per split: fewer splits
  plan.split_positions = static_cast<int>(max_of(least, ceil_div(held, kMaxSplits * plan.positions)) * plan.positions);
  plan.splits = static_cast<int>(max_of(1, ceil_div(held, plan.split_positions)));
  plan.items = p.batch * p.num_kv_heads * plan.splits * plan.row_tiles;

  const int64_t columns = plan.chunks * vec;
  const auto place = [](int64_t end) { return static_cast<int>(ceil_div(end, 16) * 16); };
  plan.scores = place(plan.tile_rows * columns * acc);
  plan.stats = place(plan.scores + plan.positions * plan.tile_rows * acc);
  plan.keys = place(plan.stats + kStatsBytes);
  plan.values = plan.keys + static_cast<int>(plan.positions * row_pieces * 16);
  const int64_t tile_end = plan.values + plan.positions * row_pieces * 16;
  // What lies over the keys and values once they are used: sums of the threads' parts, then the factors of all splits.
  const int64_t slots = plan.value_lanes >= 32 ? kUpdateThreads / plan.value_lanes : kUpdateThreads / 32;
  const int64_t sums = plan.keys + slots * plan.tile_rows * columns * acc;
  const int64_t factors = plan.keys + plan.tile_rows * (plan.splits + 1) * acc;
  plan.shared_bytes = place(max_of(tile_end, max_of(sums, factors)));
  return plan;
}

// Elements of the workspace; one split needs none.
inline int64_t num_update_sums(const UpdateParams& p, const UpdatePlan& plan) {
  return plan.splits == 1 ? 0 : plan.items * plan.tile_rows * p.head_dim;
}
inline int64_t num_update_stats(const UpdatePlan& plan) { return plan.splits == 1 ? 0 : plan.items * plan.tile_rows * 2; }
inline int64_t num_update_counters(const UpdateParams& p, const UpdatePlan& plan) {
  return plan.splits == 1 ? 0 : p.batch * p.num_kv_heads * plan.row_tiles;
}

// One launch. The counters must be zero.
cudaError_t launch_update(const UpdateParams& params, const UpdateWorkspace& workspace, DType dtype, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
