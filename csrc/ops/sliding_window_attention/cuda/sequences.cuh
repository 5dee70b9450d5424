// Which queries and keys belong together, on the device, and how a grid finds its piece of them.
//
// Tiles of `rows` positions never cross a sequence: they are counted from its begin, so that a sequence's bits do not depend on
// what is packed around it. Where bounds are only known on the device, the tiles of sequence s take the slots from
// begin_s / rows + s on; there are total / rows + num_sequences slots, and one past the end of its sequence has nothing to do.
// Bounds are clamped: whatever they are, nothing outside of the tensors is touched.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

using fastlm::cuda::load_index;

// The elements of head_row of one position and head.
template <class T>
__device__ __forceinline__ const T* head_row(const ConstHeadRows& rows, int64_t batch, int64_t position, int64_t head) {
  return static_cast<const T*>(rows.ptr) + batch * rows.batch_stride + position * rows.seq_stride + head * rows.head_stride;
}
template <class T>
__device__ __forceinline__ T* head_row(const MutableHeadRows& rows, int64_t batch, int64_t position, int64_t head) {
  return static_cast<T*>(rows.ptr) + batch * rows.batch_stride + position * rows.seq_stride + head * rows.head_stride;
}

__device__ __forceinline__ int64_t clamp_bound(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// Sequence s, 0 <= s < num_sequences.
__device__ inline Sequence sequence_of(const Params& p, int64_t s) {
  const DeviceSequences& d = p.device;
  if (d.cu_q == nullptr) return {s, 0, d.total_q, 0, d.total_k};
  const int64_t q_begin = clamp_bound(load_index(d.cu_q, d.cu_q_64, s), 0, d.total_q);
  const int64_t q_end = clamp_bound(load_index(d.cu_q, d.cu_q_64, s + 1), q_begin, d.total_q);
  const int64_t k_begin = clamp_bound(load_index(d.cu_k, d.cu_k_64, s), 0, d.total_k);
  const int64_t k_end = clamp_bound(load_index(d.cu_k, d.cu_k_64, s + 1), k_begin, d.total_k);
  return {0, q_begin, q_end - q_begin, k_begin, k_end - k_begin};
}

struct Tile {
  int64_t sequence;
  int64_t first;  // first query (or key) of the tile, counted from the begin of its sequence; may lie past its end
};

// Slots of a grid over the tiles of all sequences. Host and device.
inline __host__ __device__ int64_t num_slots(int64_t total, int64_t num_sequences, bool packed, int64_t rows) {
  if (num_sequences == 0) return 0;
  return packed ? total / rows + num_sequences : num_sequences * ((total + rows - 1) / rows);
}
inline __host__ __device__ int64_t query_slots(const DeviceSequences& d, int64_t rows) {
  return num_slots(d.total_q, d.num_sequences, d.cu_q != nullptr, rows);
}
inline __host__ __device__ int64_t key_slots(const DeviceSequences& d, int64_t rows) {
  return num_slots(d.total_k, d.num_sequences, d.cu_k != nullptr, rows);
}

__device__ inline Tile tile_at(const void* cu, bool cu_64, int64_t num_sequences, int64_t total, int64_t slot, int64_t rows) {
  if (cu == nullptr) {
    const int64_t tiles = (total + rows - 1) / rows;
    return {slot / tiles, slot % tiles * rows};
  }
  const auto first_slot = [&](int64_t s) { return clamp_bound(load_index(cu, cu_64, s), 0, total) / rows + s; };
  int64_t low = 0;
  int64_t high = num_sequences;  // the last sequence whose first slot is at most `slot`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(middle) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = (slot - first_slot(low)) * rows;
  return {low, first < 0 ? total : first};  // negative only where bounds decrease: past every end
}

// The tile of `rows` queries at a slot below query_slots.
__device__ inline Tile tile_of(const Params& p, int64_t slot, int64_t rows) {
  const DeviceSequences& d = p.device;
  return tile_at(d.cu_q, d.cu_q_64, d.num_sequences, d.total_q, slot, rows);
}
// The tile of `rows` keys at a slot below key_slots.
__device__ inline Tile key_tile_of(const Params& p, int64_t slot, int64_t rows) {
  const DeviceSequences& d = p.device;
  return tile_at(d.cu_k, d.cu_k_64, d.num_sequences, d.total_k, slot, rows);
}

struct Range {
  int64_t begin, end;  // empty: begin >= end
};

// Keys that some query of [first, last] sees: both ends never decrease with the query.
__device__ inline Range visible_keys(const Params& p, const Sequence& s, int64_t first, int64_t last) {
  const int64_t shift = s.k_len - s.q_len;
  const int64_t begin = first + shift - p.left, end = last + shift + p.right + 1;
  return {begin < 0 ? 0 : begin, end < s.k_len ? end : s.k_len};
}
// Queries that see some key of [first, last].
__device__ inline Range visible_queries(const Params& p, const Sequence& s, int64_t first, int64_t last) {
  const int64_t shift = s.q_len - s.k_len;
  const int64_t begin = first + shift - p.right, end = last + shift + p.left + 1;
  return {begin < 0 ? 0 : begin, end < s.q_len ? end : s.q_len};
}

}  // namespace fastlm::sliding_window_attention::cuda
