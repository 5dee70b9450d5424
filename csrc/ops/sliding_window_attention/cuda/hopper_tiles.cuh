// Which queries a tile holds, which blocks of keys it meets, and in which order tiles are handed out, on sm_90a.
//
// Key blocks lie at multiples of their size counted from the first key of the sequence and are met in descending order: a row's
// bits do not depend on which queries share its tile.
#pragma once

#include "core/cuda/hopper.cuh"
#include "ops/sliding_window_attention/cuda/hopper_params.h"
#include "ops/sliding_window_attention/cuda/sequences.cuh"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

struct TilePlace {
  int64_t slot, head;
};

__device__ __forceinline__ TilePlace place_of(const TileOrder& o, int64_t tile) {
  const int64_t first = tile / (o.section * o.slots) * o.section;
  const int64_t heads = min(o.section, o.heads - first);
  const int64_t rest = tile - first * o.slots;
  return {o.slots - 1 - rest / heads, first + rest % heads};
}

// The tiles of one block: those of its number, forth and back over the grid, so that every block gets long and short ones.
struct TileWalk {
  int64_t round = 0;
  __device__ __forceinline__ int64_t tile(int64_t block, int64_t blocks) const {
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }
};

struct QueryTile {
  int32_t batch, head, kv_head;
  int32_t q_begin, q_len, k_begin, k_len;  // of the sequence
  int32_t q0;                              // first query, in the sequence
  int32_t first, last;                     // key blocks [first, last)
  int32_t left_edge, right_edge;           // blocks in [left_edge, right_edge) are seen whole by every query

  __device__ __forceinline__ bool any() const { return q0 < q_len; }
  __device__ __forceinline__ bool edge(int32_t block) const { return block < left_edge || block >= right_edge; }
};

template <int kRows, int kKeys>
__device__ __forceinline__ QueryTile query_tile(const Params& p, const TileOrder& o, int64_t tile) {
  const TilePlace place = place_of(o, tile);
  int64_t sequence = place.head / p.num_heads, row = place.slot * kRows;
  if (p.device.cu_q != nullptr) {
    const Tile start = tile_of(p, place.slot, kRows);
    sequence = start.sequence;
    row = start.first;
  }
  const Sequence s = sequence_of(p, sequence);
  QueryTile t;
  t.batch = static_cast<int32_t>(s.batch);
  t.head = static_cast<int32_t>(place.head % p.num_heads);
  t.kv_head = static_cast<int32_t>(t.head / (p.num_heads / p.num_kv_heads));
  t.q_begin = static_cast<int32_t>(s.q_begin);
  t.q_len = static_cast<int32_t>(s.q_len);
  t.k_begin = static_cast<int32_t>(s.k_begin);
  t.k_len = static_cast<int32_t>(s.k_len);
  t.q0 = static_cast<int32_t>(row);
  const int64_t first_position = row + s.k_len - s.q_len;
  const int64_t last_position = min(row + kRows, s.q_len) - 1 + s.k_len - s.q_len;
  const int64_t begin = max(first_position - p.left, int64_t{0});
  const int64_t end = min(last_position + p.right + 1, s.k_len);
  t.first = static_cast<int32_t>(begin / kKeys);
  t.last = begin < end ? static_cast<int32_t>((end + kKeys - 1) / kKeys) : t.first;
  const int64_t whole_begin = max(last_position - p.left, int64_t{0});
  const int64_t whole_end = max(min(first_position + p.right + 1, s.k_len), int64_t{0});
  t.left_edge = static_cast<int32_t>((whole_begin + kKeys - 1) / kKeys);
  t.right_edge = static_cast<int32_t>(whole_end / kKeys);
  return t;
}

// Keys [begin, end) that query `row` of the sequence sees.
struct KeyRange {
  int32_t begin, end;
};
__device__ __forceinline__ KeyRange keys_of(const Params& p, const QueryTile& t, int32_t row) {
  const int64_t position = int64_t{row} + t.k_len - t.q_len;
  return {static_cast<int32_t>(max(position - p.left, int64_t{0})),
          static_cast<int32_t>(min(position + p.right + 1, int64_t{t.k_len}))};
}

// A place in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Whether one of the two 16-bit floats in `pair` is not finite; if so, it becomes zero.
template <class T>
__device__ __forceinline__ bool drop_infinite(uint32_t& pair) {
  constexpr uint32_t kExponent = DTypeOf<T>::value == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
  const bool low = (pair & kExponent) == kExponent, high = (pair >> 16 & kExponent) == kExponent;
  if (low) pair &= 0xffff0000u;
  if (high) pair &= 0x0000ffffu;
  return low || high;
}
// The same for sixteen bytes of shared memory.
template <class T>
__device__ __forceinline__ bool drop_infinite(char* piece) {
  auto* p = reinterpret_cast<uint4*>(piece);
  uint4 x = *p;
  bool found = drop_infinite<T>(x.x);
  found |= drop_infinite<T>(x.y);
  found |= drop_infinite<T>(x.z);
  found |= drop_infinite<T>(x.w);
  if (found) *p = x;
  return found;
}

}  // namespace fastlm::sliding_window_attention::cuda
