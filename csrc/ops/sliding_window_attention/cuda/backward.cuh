// Sliding-window attention, backward, on matrix units (bfloat16 and float16, head dims up to 256). With P = exp(s - lse) and
// D_i = dout_i . out_i - dlse_i (row_delta):
//   dv_j = sum_i P_ij dout_i,  dS_ij = P_ij (dout_i . v_j - D_i) * ds/d(raw),  dq_i = scale sum_j dS_ij k_j,
//   dk_j = scale sum_i dS_ij q_i
// (Dao et al., arXiv 2205.14135, section 3).
//
// Two passes of one shape, in which a team of four warps keeps the sums of its 64 rows in registers: rows are queries (dq,
// walking over the keys they see), or keys (dk and dv, walking over the heads of the group and the queries that see them, in
// order). S and dP are computed in both, seven products per pair instead of five; what that buys: no sums shared between blocks,
// so no atomics, and no partial dq in memory, which for a window of 2048 would be about 16 slots of fp32 dq (32 KiB written and
// 32 KiB read per pair of tiles of 64 and 128, against 10 MFLOP: the memory bus as busy as the matrix units). Weights go from
// accumulators to operands without leaving the registers, since rows stay with their warp. Bound by shared memory reads and the
// matrix units.
//
// With head dims above 128 dk and dv take a pass each, since the sums of both do not fit in registers.
#pragma once

#include "ops/sliding_window_attention/cuda/mma.cuh"
#include "ops/sliding_window_attention/cuda/scoring.cuh"

namespace fastlm::sliding_window_attention::cuda {

using fastlm::cuda::commit_copies;
using fastlm::cuda::exp2_approx;
using fastlm::cuda::wait_copies;

enum class Gradient { kQueries, kKeysAndValues, kKeys, kValues };

template <int kHeadDim, Gradient kGradient>
struct BackwardShape {
  static constexpr int kDim = kHeadDim;  // padded head dim: 64, 128 or 256
  static constexpr int kThreads = 128;
  static constexpr bool kByKeys = kGradient != Gradient::kQueries;
  static constexpr bool kNeedsScores = kGradient != Gradient::kValues;  // dS, and so the second operand of rows
  static constexpr bool kNeedsWeights = kGradient == Gradient::kValues || kGradient == Gradient::kKeysAndValues;
  static constexpr int kRows = 64;
  static constexpr int kColumns = kDim <= 128 ? 64 : 32;
  static constexpr int kStages = kDim <= 128 ? 2 : 1;  // of the first operand of columns
  static constexpr int kRowBytes = kRows * 2 * kDim, kColumnBytes = kColumns * 2 * kDim;
  static constexpr int kStatBytes = kByKeys ? (kStages + 1) * kColumns * 4 : 0;  // lse per stage, delta
  // At head dim 128 two blocks per multiprocessor with 164 KiB (each at most 81 KiB), one with 100 KiB.
  static constexpr int kSharedBytes = (kNeedsScores ? 2 : 1) * kRowBytes + (kStages + 1) * kColumnBytes + kStatBytes + 128;

  static __host__ __device__ int64_t items(const Params& p) {
    return kByKeys ? key_slots(p.device, kRows) * p.num_kv_heads : query_slots(p.device, kRows) * p.num_heads;
  }
};

// Two neighbouring columns of a lane in block n.
__device__ __forceinline__ float2 column_pair(const float* columns, int n, int lane) {
  return *reinterpret_cast<const float2*>(columns + 8 * n + 2 * (lane & 3));
}

// The slope of softcap at the scores of a tile; without softcap there is none to keep.
template <int kN, bool kSoftcap>
struct Slope {
  static constexpr bool kApplies = kSoftcap;
  float at[kSoftcap ? kN : 1][4];

  __device__ __forceinline__ void keep(const float (&scores)[kN][4], const Scoring<float>& score) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[n][i] = score.slope(scores[n][i]);
    }
  }
  __device__ __forceinline__ void apply(float (&w)[kN][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[n][i] *= at[n][i];
    }
  }
};

// One tile of 64 queries of one head, or of 64 keys of one key head; 0 <= item < BackwardShape::items.
template <class T, int kHeadDim, Gradient kGradient>
__device__ __forceinline__ void backward_tile(const Team<128>& team, const BackwardParams& p, const TileOptions& options,
                                              int64_t item, char* shared) {
  using Shape = BackwardShape<kHeadDim, kGradient>;
  constexpr int kDim = Shape::kDim, kRows = Shape::kRows, kColumns = Shape::kColumns, kStages = Shape::kStages;
  constexpr bool kByKeys = Shape::kByKeys, kNeedsScores = Shape::kNeedsScores, kNeedsWeights = Shape::kNeedsWeights;
  const int64_t heads = kByKeys ? p.num_kv_heads : p.num_heads;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t row_head = item % heads;
  const Tile tile =
      kByKeys ? key_tile_of(p, item / heads, kRows) : tile_of(p, query_slots(p.device, kRows) - 1 - item / heads, kRows);
  const Sequence s = sequence_of(p, tile.sequence);
  const int64_t num_rows = kByKeys ? s.k_len : s.q_len;
  if (tile.first >= num_rows) return;

  // Rows: q and dout, or k and v. Columns: k and v, or q and dout.
  char* const rows1 = shared;
  char* const rows2 = rows1 + Shape::kRowBytes;
  char* const columns1 = rows1 + (kNeedsScores ? 2 : 1) * Shape::kRowBytes;
  char* const columns2 = columns1 + kStages * Shape::kColumnBytes;
  float* const column_lse = reinterpret_cast<float*>(columns2 + Shape::kColumnBytes);  // [stage][column]
  float* const column_delta = column_lse + (kByKeys ? kStages * kColumns : 0);
  volatile int* const found = reinterpret_cast<volatile int*>(columns2 + Shape::kColumnBytes + Shape::kStatBytes);  // [operand]
  const int lane = team.thread % 32, warp_row = team.thread / 32 * 16;
  const LaneRows lanes = lane_rows(lane);
  const int head_dim = static_cast<int>(p.head_dim);
  const Scoring<float>& score = options.score;
  const bool vectors = options.vectors;

  const int64_t last = (tile.first + kRows < num_rows ? tile.first + kRows : num_rows) - 1;
  const Range seen = kByKeys ? visible_queries(p, s, tile.first, last) : visible_keys(p, s, tile.first, last);
  const int64_t first_column = seen.begin / kColumns * kColumns;

  const int num_tiles = seen.begin < seen.end ? static_cast<int>((seen.end - first_column + kColumns - 1) / kColumns) : 0;
  const int64_t first_head = kByKeys ? row_head * group : row_head / group;  // of columns
  const int num_steps = num_tiles * (kByKeys ? static_cast<int>(group) : 1);
  const ConstHeadRows &from1 = kByKeys ? p.q : p.k, &from2 = kByKeys ? p.dout : p.v;
  const auto band_at = [&](int i) {
    const int64_t column = first_column + static_cast<int64_t>(i) * kColumns;
    return kByKeys ? keys_see(p, s, tile.first, column) : queries_see(p, s, tile.first, column);
  };
  const auto load_rows = [&](char* to, const ConstHeadRows& from) {
    const T* x = own_piece<kDim>(team, head_row<T>(from, s.batch, (kByKeys ? s.k_begin : s.q_begin) + tile.first, row_head),
                                 from.seq_stride);
    load_tile<kRows, kDim>(team, to, x, from.seq_stride, static_cast<int>(last + 1 - tile.first), head_dim, vectors);
  };
  const auto stat_index = [&](int64_t query, int64_t head) {
    return s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_begin + query;
  };
  // Where the next copy of either operand of columns reads, and after the last tile of a head how far it is to the next head.
  const int64_t column_begin = (kByKeys ? s.q_begin : s.k_begin) + first_column;
  const T *at1 = nullptr, *at2 = nullptr;
  int64_t stats_at = kByKeys ? stat_index(first_column, first_head) + team.thread : 0;  // of the second operand
  const auto load_stats = [&](float* to, const void* from, int64_t at, int limit) {
    if (team.thread < kColumns) copy_async<4>(to + team.thread, static_cast<const float*>(from) + at, team.thread < limit);
  };
  // `limit`: columns that exist from there on; `at`: of their lse.
  const auto load_first = [&](int stage, int limit, bool ends_head, int64_t at) {
    load_tile<kColumns, kDim>(team, columns1 + stage * Shape::kColumnBytes, at1, from1.seq_stride, limit, head_dim, vectors);
    at1 += kColumns * from1.seq_stride;
    if (ends_head) at1 += from1.head_stride - num_tiles * (kColumns * from1.seq_stride);
    if constexpr (kByKeys) load_stats(column_lse + stage * kColumns, p.lse, at, limit);
  };
  const auto load_second = [&](int limit, bool ends_head) {
    load_tile<kColumns, kDim>(team, columns2, at2, from2.seq_stride, limit, head_dim, vectors);
    at2 += kColumns * from2.seq_stride;
    if (ends_head) at2 += from2.head_stride - num_tiles * (kColumns * from2.seq_stride);
    if constexpr (kByKeys && kNeedsScores) load_stats(column_delta, p.row_delta, stats_at, limit);
    stats_at += ends_head ? p.lse_head_stride - (num_tiles - 1) * static_cast<int64_t>(kColumns) : kColumns;
  };

  // Of the lane's rows 8 half + lane / 4: 0 where there is none.
  float row_lse[2] = {}, row_delta[2] = {};
  if constexpr (!kByKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = tile.first + warp_row + 8 * half + lane / 4;
      if (i < s.q_len) {
        row_lse[half] = static_cast<const float*>(p.lse)[stat_index(i, row_head)] * kLog2e;
        row_delta[half] = static_cast<const float*>(p.row_delta)[stat_index(i, row_head)];
      }
    }
  }

  float sum1[1][kDim / 8][4] = {};  // dq or dk, over softmax_scale
  float sum2[1][kDim / 8][4] = {};  // dv
  team.sync();                      // of the tile before: everybody is done with its shared memory
  Band band = band_at(0);
  if (num_steps > 0) {
    if (team.thread < 2) found[team.thread] = 0;
    team.sync();  // before somebody finds something
    at1 = own_piece<kDim>(team, head_row<T>(from1, s.batch, column_begin, first_head), from1.seq_stride);
    at2 = own_piece<kDim>(team, head_row<T>(from2, s.batch, column_begin, first_head), from2.seq_stride);
    load_rows(rows1, kByKeys ? p.k : p.q);
    if constexpr (kNeedsScores) load_rows(rows2, kByKeys ? p.v : p.dout);
    load_first(0, band.limit, num_tiles == 1, stats_at);
    commit_copies();
    int i = 0;  // tile of the head
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      // The next tile is the one to the right or the next head's first.
      const bool ends_head = i + 1 == num_tiles;
      const int next_i = ends_head ? 0 : i + 1;
      const Band next_band = next_i % kExactMoves == 0 ? band_at(next_i) : band.moved(kColumns);
      const bool next_ends_head = next_i + 1 == num_tiles;
      const int next_stage = kStages > 1 ? 1 - stage : 0;
      const bool full = band.is_full(kRows, kColumns);
      const bool idle = band.is_empty(warp_row, 16, kColumns);
      char* const first = columns1 + stage * Shape::kColumnBytes;

      // What is found before a barrier is read between it and the next, and not written again before that.
      wait_copies<0>();
      if (kNeedsScores && !full && found_not_finite<T, kColumns, kDim>(team, first)) found[0] = 1;
      team.sync();
      const bool bad1 = !full && found[0] != 0;
      load_second(band.limit, ends_head);
      commit_copies();
      if (kStages > 1 && step + 1 < num_steps) load_first(next_stage, next_band.limit, next_ends_head, stats_at);
      commit_copies();

      float w[1][kColumns / 8][4];
      Weights<1, kColumns / 8> weights, gradients;
      if (!idle) {
        multiply_rows<T, kDim>(w, rows1 + warp_row * 2 * kDim, first, lanes);
        if (score.transform) {
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) w[0][n][i] = score.apply_approx(w[0][n][i]);
          }
        }
        const auto weigh = [&](auto slope) {
          if constexpr (slope.kApplies) slope.keep(w[0], score);
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            float minus[2] = {row_lse[0], row_lse[0]}, other[2] = {row_lse[1], row_lse[1]};
            if constexpr (kByKeys) {
              const float2 pair = column_pair(column_lse + stage * kColumns, n, lane);
              minus[0] = other[0] = pair.x * kLog2e;
              minus[1] = other[1] = pair.y * kLog2e;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              w[0][n][i] = exp2_approx(fmaf(w[0][n][i], score.log2_unit, -minus[i]));
              w[0][n][2 + i] = exp2_approx(fmaf(w[0][n][2 + i], score.log2_unit, -other[i]));
            }
          }
          if (!full) mask(w, band, warp_row + lane / 4, lane, 0.0f);
          if constexpr (kNeedsWeights) pack_weights<T>(weights, w);
          if constexpr (slope.kApplies) slope.apply(w[0]);
        };
        if (kNeedsScores && score.softcap > 0) {
          weigh(Slope<kColumns / 8, true>{});
        } else {
          weigh(Slope<kColumns / 8, false>{});
        }
      }

      wait_copies<1>();
      if (kNeedsWeights && !full && found_not_finite<T, kColumns, kDim>(team, columns2)) found[1] = 1;
      team.sync();
      const bool bad2 = !full && found[1] != 0;
      if (kNeedsScores && !idle) {
        float ds[1][kColumns / 8][4];
        multiply_rows<T, kDim>(ds, rows2 + warp_row * 2 * kDim, columns2, lanes);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          float minus[2] = {row_delta[0], row_delta[0]}, other[2] = {row_delta[1], row_delta[1]};
          if constexpr (kByKeys) {
            const float2 pair = column_pair(column_delta, n, lane);
            minus[0] = other[0] = pair.x;
            minus[1] = other[1] = pair.y;
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            ds[0][n][i] = w[0][n][i] * (ds[0][n][i] - minus[i]);
            ds[0][n][2 + i] = w[0][n][2 + i] * (ds[0][n][2 + i] - other[i]);
          }
        }
        if (!full) mask(ds, band, warp_row + lane / 4, lane, 0.0f);
        pack_weights<T>(gradients, ds);
      }
      if (bad1 || bad2) {
        team.sync();
        if (bad1) add_not_finite<T, kDim, kColumns, true>(sum1, first, band, warp_row + lane / 4, lane);
        if (bad2) add_not_finite<T, kDim, kColumns, false>(sum2, columns2, band, warp_row + lane / 4, lane);
        team.sync();
        if (bad1) replace_not_finite<T, kColumns, kDim>(team, first);
        if (bad2) replace_not_finite<T, kColumns, kDim>(team, columns2);
        team.sync();
      }
      if (!idle) {
        if constexpr (kNeedsWeights) add_weighted<T, kDim>(sum2, weights, columns2, lanes);
        if constexpr (kNeedsScores) add_weighted<T, kDim>(sum1, gradients, first, lanes);
      }
      if (kStages == 1 && step + 1 < num_steps) {
        team.sync();
        load_first(0, next_band.limit, next_ends_head, stats_at);
        commit_copies();
      }
      i = next_i;
      band = next_band;
      stage = next_stage;
    }
    wait_copies<0>();
  }

  const int count = static_cast<int>(last + 1 - tile.first) - warp_row;
  const int64_t position = (kByKeys ? s.k_begin : s.q_begin) + tile.first + warp_row;
  const auto store = [&](const float (&sum)[1][kDim / 8][4], float by, char* through, const MutableHeadRows& to) {
    const float factor[1][2] = {{by, by}};
    store_rows<T, kDim>(sum, factor, through + warp_row * 2 * kDim, head_row<T>(to, s.batch, position, row_head), to.seq_stride,
                        count, head_dim, vectors, lane);
  };
  if constexpr (kNeedsScores) store(sum1, score.gradient_scale, rows1, kByKeys ? p.dk : p.dq);
  if constexpr (kNeedsWeights) store(sum2, 1.0f, kNeedsScores ? rows2 : rows1, p.dv);
}

template <class T, int kHeadDim, Gradient kGradient>
__global__ void __launch_bounds__(128)
    backward_mma(const __grid_constant__ BackwardParams p, const __grid_constant__ TileOptions options, int64_t first_item) {
  const Team<128> team{static_cast<int>(threadIdx.x), 1};
  backward_tile<T, kHeadDim, kGradient>(team, p, options, first_item + blockIdx.x, fastlm::cuda::shared_memory());
}

}  // namespace fastlm::sliding_window_attention::cuda
