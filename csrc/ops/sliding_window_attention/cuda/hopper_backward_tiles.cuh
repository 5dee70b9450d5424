// Geometry and shared memory of the backward kernel on sm_90a.
#pragma once

#include "core/cuda/hopper.cuh"
#include "ops/sliding_window_attention/cuda/hopper_tiles.cuh"

namespace fastlm::sliding_window_attention::cuda {

// kD: width of a head, padded to 64 or 128.
template <int kD>
struct BackwardShape {
  static constexpr int kKeys = 128;
  static constexpr int kQueries = kD == 64 ? 128 : 64;  // of a step; one panel of dS holds 64
  static constexpr int kPanels = kD / 64, kWeightPanels = kQueries / 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 384;
  static constexpr int kStatWarps = 2;
  static constexpr int kKeyBytes = kKeys * kD * 2, kQueryBytes = kQueries * kD * 2;
  static constexpr int kWeightBytes = kKeys * kQueries * 2;
  static constexpr int kSumFloats = kQueries * kD;  // 8192: 32 for each consumer thread
};

// A tile of keys and the blocks of queries that see some of them: [first, last).
struct KeyTile {
  int32_t batch, kv_head, sequence_row;    // sequence_row: row of the batch; 0 if packed
  int32_t q_begin, q_len, k_begin, k_len;  // of the sequence
  int32_t k0;                              // first key, in the sequence
  int32_t first, last;
  int32_t left_edge, right_edge;  // blocks in [left_edge, right_edge) see all keys of the tile with all their queries
  int64_t first_slot;             // slot of query block 0

  __device__ __forceinline__ bool any() const { return k0 < k_len; }
  __device__ __forceinline__ bool edge(int32_t block) const { return block < left_edge || block >= right_edge; }
};

template <int kD>
__device__ __forceinline__ KeyTile key_tile(const HopperBackward& f, int64_t ticket) {
  using Shape = BackwardShape<kD>;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  const BackwardParams& p = f.p;
  TilePlace place = place_of(f.keys, ticket);
  place.slot = f.keys.slots - 1 - place.slot;  // from the first keys on: a tile waits for earlier ones only
  int64_t sequence = place.head / p.num_kv_heads, row = place.slot * kKeys;
  if (p.device.cu_k != nullptr) {
    const Tile start = key_tile_of(p, place.slot, kKeys);
    sequence = start.sequence;
    row = start.first;
  }
  const Sequence s = sequence_of(p, sequence);
  KeyTile t;
  t.batch = static_cast<int32_t>(s.batch);
  t.kv_head = static_cast<int32_t>(place.head % p.num_kv_heads);
  t.sequence_row = p.device.cu_k != nullptr ? 0 : static_cast<int32_t>(sequence);
  t.q_begin = static_cast<int32_t>(s.q_begin);
  t.q_len = static_cast<int32_t>(s.q_len);
  t.k_begin = static_cast<int32_t>(s.k_begin);
  t.k_len = static_cast<int32_t>(s.k_len);
  t.k0 = static_cast<int32_t>(row);
  t.first_slot = p.device.cu_q != nullptr ? s.q_begin / kQueries + sequence : 0;
  const int64_t last_key = min(row + kKeys, s.k_len) - 1;
  const Range seen = visible_queries(p, s, row, last_key);
  t.first = static_cast<int32_t>(seen.begin / kQueries);
  t.last = seen.begin < seen.end ? static_cast<int32_t>((seen.end + kQueries - 1) / kQueries) : t.first;
  // Queries that see the whole tile: not before the last key's first, not after the first key's last; a tile that is not full is
  // never seen whole.
  const Range of_first = visible_queries(p, s, row, row), of_last = visible_queries(p, s, last_key, last_key);
  t.left_edge = static_cast<int32_t>((of_last.begin + kQueries - 1) / kQueries);
  t.right_edge = row + kKeys > s.k_len ? 0 : static_cast<int32_t>(max(of_first.end, int64_t{0}) / kQueries);
  return t;
}

// How many tiles of keys add to a block of queries before the tile at k0.
template <int kD>
__device__ __forceinline__ int turn_of(const Params& p, const KeyTile& t, int block) {
  using Shape = BackwardShape<kD>;
  const int64_t first_position = int64_t{block} * Shape::kQueries + t.k_len - t.q_len;
  const int64_t begin = max(first_position - p.left, int64_t{0});
  return static_cast<int>(t.k0 / Shape::kKeys - begin / Shape::kKeys);
}

// Queries [begin, end) that see a key of the tile.
__device__ __forceinline__ KeyRange queries_of(const Params& p, const KeyTile& t, int32_t key) {
  const int64_t at = int64_t{key} + t.q_len - t.k_len;
  if (key >= t.k_len) return {0, 0};
  return {static_cast<int32_t>(max(at - p.right, int64_t{0})),
          static_cast<int32_t>(max(min(at + p.left + 1, int64_t{t.q_len}), int64_t{0}))};
}

template <int kD>
struct BackwardShared {
  using Shape = BackwardShape<kD>;
  char *k, *v;         // panels (kKeys, 64)
  char *q, *dout;      // stages of panels (kQueries, 64)
  char* weights;       // two of dS^T: panels (kKeys, 64)
  float* dq;           // (consumer warpgroups, 8, 128, 4)
  float *lse, *delta;  // stages (kQueries)
  float* key_flags;    // (kKeys): 0, or NaN where a key is not finite
  Mbarrier *kv_full, *k_checked, *q_full, *q_empty, *dout_full, *dout_empty, *rows_full, *dq_full, *dq_empty;
  int* ticket;

  static constexpr int kBytes = 2 * Shape::kKeyBytes + 2 * Shape::kStages * Shape::kQueryBytes + 2 * Shape::kWeightBytes +
                                Shape::kSumFloats * 4 + 2 * Shape::kStages * Shape::kQueries * 4 + Shape::kKeys * 4 +
                                (4 + 5 * Shape::kStages) * 8 + 16;

  __device__ __forceinline__ explicit BackwardShared(char* shared) {
    k = shared;
    v = k + Shape::kKeyBytes;
    q = v + Shape::kKeyBytes;
    dout = q + Shape::kStages * Shape::kQueryBytes;
    weights = dout + Shape::kStages * Shape::kQueryBytes;
    dq = reinterpret_cast<float*>(weights + 2 * Shape::kWeightBytes);
    lse = dq + Shape::kSumFloats;
    delta = lse + Shape::kStages * Shape::kQueries;
    key_flags = delta + Shape::kStages * Shape::kQueries;
    kv_full = reinterpret_cast<Mbarrier*>(key_flags + Shape::kKeys);
    k_checked = kv_full + 1;
    dq_full = kv_full + 2;
    dq_empty = kv_full + 3;
    q_full = kv_full + 4;
    q_empty = q_full + Shape::kStages;
    dout_full = q_empty + Shape::kStages;
    dout_empty = dout_full + Shape::kStages;
    rows_full = dout_empty + Shape::kStages;
    ticket = reinterpret_cast<int*>(rows_full + Shape::kStages);
  }

  // By one thread; a barrier of the block must follow.
  __device__ __forceinline__ void open() const {
    mbarrier_init(kv_full, 1);
    mbarrier_init(k_checked, Shape::kStatWarps);
    mbarrier_init(dq_full, 8);  // consumer warps
    mbarrier_init(dq_empty, 1);
    for (int i = 0; i < Shape::kStages; ++i) {
      mbarrier_init(q_full + i, 1);
      mbarrier_init(q_empty + i, 8 + Shape::kStatWarps);
      mbarrier_init(dout_full + i, 1);
      mbarrier_init(dout_empty + i, 8 + Shape::kStatWarps);
      mbarrier_init(rows_full + i, Shape::kStatWarps);
    }
    mbarrier_fence_init();
  }
};

// The steps of a tile, the same for all its roles: the heads of the group, and for each the blocks of queries from the last to
// the first. Neighbouring tiles, which start at about the same time, are then at different blocks, each after the one before it.
template <class F>
__device__ __forceinline__ void for_each_step(const HopperBackward& f, const KeyTile& t, F&& step) {
  const int group = static_cast<int>(f.p.num_heads / f.p.num_kv_heads);
  for (int g = 0; g < group; ++g) {
    for (int block = t.last - 1; block >= t.first; --block) step(t.kv_head * group + g, block);
  }
}

}  // namespace fastlm::sliding_window_attention::cuda
