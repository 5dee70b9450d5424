// Who sees whom between two tiles.
#pragma once

#include "ops/sliding_window_attention/cuda/sequences.cuh"

namespace fastlm::sliding_window_attention::cuda {

// Row r of a tile and column c of another see each other where low <= c - r <= high and c < limit.
struct Band {
  int low, high, limit;

  // Every one of `rows` rows sees every one of `columns` columns.
  __device__ __forceinline__ bool is_full(int rows, int columns) const {
    return low <= 1 - rows && high >= columns - 1 && limit >= columns;
  }
  // None of the rows [first, first + rows) sees one of `columns` columns.
  __device__ __forceinline__ bool is_empty(int first, int rows, int columns) const {
    return low + first >= columns || high + first + rows - 1 < 0 || limit <= 0;
  }
  // For columns that begin `by` later.
  __device__ __forceinline__ Band moved(int by) const { return {low - by, high - by, limit - by}; }
  __device__ __forceinline__ int begin(int row) const { return low + row; }
  __device__ __forceinline__ int end(int row) const { return high + row + 1 < limit ? high + row + 1 : limit; }
};

// A bound beyond every tile is cut; Band::moved keeps it there for kExactMoves tiles.
constexpr int kExactMoves = 1 << 15;
__device__ __forceinline__ int band_bound(int64_t x) { return static_cast<int>(clamp_bound(x, -(1 << 28), 1 << 28)); }

// Queries from `query` on as rows, keys from `key` on as columns.
__device__ __forceinline__ Band queries_see(const Params& p, const Sequence& s, int64_t query, int64_t key) {
  const int64_t d = query + s.k_len - s.q_len - key;
  return {band_bound(d - p.left), band_bound(d + p.right), band_bound(s.k_len - key)};
}
// Keys as rows, queries as columns.
__device__ __forceinline__ Band keys_see(const Params& p, const Sequence& s, int64_t key, int64_t query) {
  const int64_t d = query + s.k_len - s.q_len - key;
  return {band_bound(-d - p.right), band_bound(p.left - d), band_bound(s.q_len - query)};
}

}  // namespace fastlm::sliding_window_attention::cuda
