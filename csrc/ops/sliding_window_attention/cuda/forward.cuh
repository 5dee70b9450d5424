// Sliding-window attention, forward, on matrix units (bfloat16 and float16, head dims up to 256):
// out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys that query i sees.
//
// A team of four warps holds kRows queries of one head and walks over the key tiles inside their window, with an online softmax
// in fp32 registers (Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691). While scores of a tile are computed its
// values arrive, while they are added up the next keys do. A warp has 32 rows (head dim up to 128), so that each fragment read
// from shared memory serves two products; bound by the matrix units, then by shared memory.
//
// A row's bits depend on its own query, keys and values only: key tiles lie at fixed positions of the sequence, and a tile the
// row does not see leaves its sums as they are.
#pragma once

#include "ops/sliding_window_attention/cuda/mma.cuh"
#include "ops/sliding_window_attention/cuda/scoring.cuh"

namespace fastlm::sliding_window_attention::cuda {

using fastlm::cuda::commit_copies;
using fastlm::cuda::exp2_approx;
using fastlm::cuda::wait_copies;

template <int kHeadDim>
struct ForwardShape {
  static constexpr int kDim = kHeadDim;  // padded head dim: 64, 128 or 256
  static constexpr int kThreads = 128;
  static constexpr int kM = kDim <= 128 ? 2 : 1;  // blocks of 16 rows per warp: the sums of a row block take kDim / 2 registers
  static constexpr int kRows = 64 * kM;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kQueryBytes = kRows * 2 * kDim;
  static constexpr int kTileBytes = kKeys * 2 * kDim;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kTileBytes + 128;  // 64 KiB: two blocks per multiprocessor

  static __host__ __device__ int64_t items(const Params& p) { return query_slots(p.device, kRows) * p.num_heads; }
};

// The running softmax of the rows of a lane.
template <int kM>
struct RowSums {
  float top[kM][2];    // largest score so far, in units of the raw product
  float total[kM][2];  // sum of weights, of this lane's columns
};

// Scores become weights; sums so far are scaled to the new maxima.
template <int kM, int kN, int kO>
__device__ __forceinline__ void online_softmax(float (&s)[kM][kN][4], float (&o)[kM][kO][4], RowSums<kM>& rows, float unit) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = rows.top[m][half];  // a NaN score leaves the maximum alone and reaches the sum below
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      const float shift = (top == -INFINITY ? 0.0f : top) * unit;
      const float factor = exp2_approx(fmaf(rows.top[m][half], unit, -shift));
      rows.top[m][half] = top;
      float total = rows.total[m][half] * factor;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[m][n][2 * half + i];
          x = exp2_approx(fmaf(x, unit, -shift));
          total += x;
        }
      }
      rows.total[m][half] = total;
#pragma unroll
      for (int n = 0; n < kO; ++n) {
        o[m][n][2 * half] *= factor;
        o[m][n][2 * half + 1] *= factor;
      }
    }
  }
}

// One tile of queries of one head; 0 <= item < ForwardShape::items. `shared`: kSharedBytes, aligned to 128.
template <class T, int kHeadDim>
__device__ __forceinline__ void forward_tile(const Team<128>& team, const Params& p, const TileOptions& options, int64_t item,
                                             char* shared) {
  using Shape = ForwardShape<kHeadDim>;
  constexpr int kDim = Shape::kDim, kM = Shape::kM, kRows = Shape::kRows, kKeys = Shape::kKeys;
  // Heads beside each other share keys in the second-level cache; the last tiles, which see most keys, come first.
  const int64_t head = item % p.num_heads;
  const Tile tile = tile_of(p, query_slots(p.device, kRows) - 1 - item / p.num_heads, kRows);
  const Sequence s = sequence_of(p, tile.sequence);
  if (tile.first >= s.q_len) return;

  char* const queries = shared;
  char* const keys = queries + Shape::kQueryBytes;
  char* const values = keys + Shape::kTileBytes;
  volatile int* const found = reinterpret_cast<volatile int*>(values + Shape::kTileBytes);
  const int lane = team.thread % 32, warp_row = team.thread / 32 * 16 * kM;
  const LaneRows lanes = lane_rows(lane);
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const Scoring<float>& score = options.score;
  const bool vectors = options.vectors;

  float o[kM][kDim / 8][4] = {};
  RowSums<kM> rows;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    rows.top[m][0] = rows.top[m][1] = -INFINITY;
    rows.total[m][0] = rows.total[m][1] = 0.0f;
  }

  const int64_t last = tile.first + kRows < s.q_len ? tile.first + kRows : s.q_len;
  const Range seen = visible_keys(p, s, tile.first, last - 1);
  const int64_t first_key = seen.begin / kKeys * kKeys;
  const int num_tiles = seen.begin < seen.end ? static_cast<int>((seen.end - first_key + kKeys - 1) / kKeys) : 0;
  const T *k = nullptr, *v = nullptr;
  const auto band_at = [&](int i) { return queries_see(p, s, tile.first, first_key + static_cast<int64_t>(i) * kKeys); };
  Band band = band_at(0);
  team.sync();  // of the tile before: everybody is done with its shared memory
  if (num_tiles > 0) {
    if (team.thread == 0) *found = 0;
    k = own_piece<kDim>(team, head_row<T>(p.k, s.batch, s.k_begin + first_key, kv_head), p.k.seq_stride);
    v = own_piece<kDim>(team, head_row<T>(p.v, s.batch, s.k_begin + first_key, kv_head), p.v.seq_stride);
    const T* q = own_piece<kDim>(team, head_row<T>(p.q, s.batch, s.q_begin + tile.first, head), p.q.seq_stride);
    load_tile<kRows, kDim>(team, queries, q, p.q.seq_stride, static_cast<int>(last - tile.first), head_dim, vectors);
    load_tile<kKeys, kDim>(team, keys, k, p.k.seq_stride, band.limit, head_dim, vectors);
    commit_copies();
  }
#pragma unroll 1
  for (int i = 0; i < num_tiles; ++i, band = i % kExactMoves == 0 ? band_at(i) : band.moved(kKeys)) {
    const bool full = band.is_full(kRows, kKeys);
    const bool idle = band.is_empty(warp_row, 16 * kM, kKeys);
    wait_copies<0>();
    team.sync();
    load_tile<kKeys, kDim>(team, values, v, p.v.seq_stride, band.limit, head_dim, vectors);
    v += kKeys * p.v.seq_stride;
    commit_copies();

    Weights<kM, kKeys / 8> weights;
    if (!idle) {
      float w[kM][kKeys / 8][4];
      multiply_rows<T, kDim>(w, queries + warp_row * 2 * kDim, keys, lanes);
      if (score.transform) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) w[m][n][i] = score.apply_approx(w[m][n][i]);
          }
        }
      }
      if (!full) mask(w, band, warp_row + lane / 4, lane, -INFINITY);
      online_softmax(w, o, rows, score.log2_unit);
      pack_weights<T>(weights, w);
    }

    wait_copies<0>();
    if (!full && found_not_finite<T, kKeys, kDim>(team, values)) *found = 1;
    team.sync();
    if (i + 1 < num_tiles) {
      k += kKeys * p.k.seq_stride;
      load_tile<kKeys, kDim>(team, keys, k, p.k.seq_stride, band.limit - kKeys, head_dim, vectors);
      commit_copies();
    }
    if (!full && *found) {
      add_not_finite<T, kDim, kKeys, false>(o, values, band, warp_row + lane / 4, lane);
      team.sync();
      replace_not_finite<T, kKeys, kDim>(team, values);
      team.sync();
    }
    if (!idle) add_weighted<T, kDim>(o, weights, values, lanes);
  }

  float inverse[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = rows.total[m][half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      inverse[m][half] = total == 0.0f ? 0.0f : 1.0f / total;  // no key: 0
      const int64_t i = tile.first + warp_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && i < s.q_len) {
        static_cast<float*>(p.lse)[s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_begin + i] =
            rows.top[m][half] * score.unit + logf(total);
      }
    }
  }
  store_rows<T, kDim>(o, inverse, queries + warp_row * 2 * kDim,
                      head_row<T>(p.out, s.batch, s.q_begin + tile.first + warp_row, head), p.out.seq_stride,
                      static_cast<int>(last - tile.first) - warp_row, head_dim, vectors, lane);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(128)
    forward_mma(const __grid_constant__ Params p, const __grid_constant__ TileOptions options, int64_t first_item) {
  const Team<128> team{static_cast<int>(threadIdx.x), 1};
  forward_tile<T, kHeadDim>(team, p, options, first_item + blockIdx.x, fastlm::cuda::shared_memory());
}

}  // namespace fastlm::sliding_window_attention::cuda
