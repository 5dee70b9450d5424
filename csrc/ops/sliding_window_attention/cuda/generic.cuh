// Sliding-window attention without matrix units: float32, float64 and head dims above 256, forward and backward, in the
// arithmetic of the accumulation type (no tf32). Formulas: forward.cuh and backward.cuh.
//
// All four passes are one loop. A block of 256 threads keeps sums of a tile of rows (queries; keys for dk and dv) in registers
// and walks over the tiles of columns that its rows see: one or two products rows x columns over the head dim, weights out of
// them, then sums += weights x a third operand. Operands come through shared memory in slices, so that any head dim fits; dq, dk
// and dv each compute the scores again. Bound by the multiply-add units and by shared memory reads.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/cuda/band.cuh"
#include "ops/sliding_window_attention/cuda/scoring.cuh"
#include "ops/sliding_window_attention/cuda/sequences.cuh"

namespace fastlm::sliding_window_attention::cuda {

using fastlm::cuda::from_acc;
using fastlm::cuda::kFullWarp;
using fastlm::cuda::Team;
using fastlm::cuda::to_acc;

enum class Pass { kForward, kQueries, kKeys, kValues };

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ double natural_log(double x) { return log(x); }
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double largest(double a, double b) { return fmax(a, b); }

template <class T, int kMaxHeadDim>
struct GenericShape {
  using A = acc_t<T>;
  static constexpr int kDim = kMaxHeadDim;             // 128 or 512
  static constexpr int kThreads = 256;                 // 16 x 16
  static constexpr int kPer = sizeof(A) == 4 ? 4 : 2;  // rows, and columns, of a thread
  static constexpr int kRows = 16 * kPer, kColumns = 16 * kPer;
  static constexpr int kSlice = 16;  // of the head dim, and of columns
  static constexpr int kStride = kRows + 16 / sizeof(A);
  static constexpr int kSums = kDim / 16;  // columns of the sums of a thread: groups of kPer neighbours, see column_of_sum
  static constexpr int kSharedBytes = static_cast<int>(sizeof(A)) * (2 * kSlice * kStride + kColumns * kStride + kSlice * kDim);

  static __host__ __device__ int64_t items(const Params& p, bool by_keys) {
    return by_keys ? key_slots(p.device, kRows) * p.num_kv_heads : query_slots(p.device, kRows) * p.num_heads;
  }
};

// 16 bytes of neighbours, read and written at once.
template <class A, int kPer>
struct alignas(16) Run {
  A at[kPer];
};
static_assert(sizeof(Run<float, 4>) == 16 && sizeof(Run<double, 2>) == 16);

// A thread's share of a tile of products: its rows and its columns are kPer neighbours each.
template <class A, int kPer>
struct Patch {
  A at[kPer][kPer];
};

template <class T, int kMaxHeadDim, Pass kPass>
struct GenericTile {
  using Shape = GenericShape<T, kMaxHeadDim>;
  using A = typename Shape::A;
  static constexpr int kPer = Shape::kPer, kRows = Shape::kRows, kColumns = Shape::kColumns, kSlice = Shape::kSlice;
  static constexpr int kStride = Shape::kStride, kSums = Shape::kSums;
  static constexpr bool kByKeys = kPass == Pass::kKeys || kPass == Pass::kValues;

  const Team<256>& team;
  int tx, ty, head_dim;
  A *left, *right;  // [kSlice][kStride]: slices of rows and columns, the head dim first
  A* weights;       // [kColumns][kStride]
  A* third;         // [kSlice][kDim]

  __device__ __forceinline__ GenericTile(const Team<256>& t, const Params& p, char* shared)
      : team(t), tx(t.thread % 16), ty(t.thread / 16), head_dim(static_cast<int>(p.head_dim)) {
    left = reinterpret_cast<A*>(shared);
    right = left + kSlice * kStride;
    weights = right + kSlice * kStride;
    third = weights + kColumns * kStride;
  }

  __device__ __forceinline__ int column_of_sum(int n) const { return n / kPer * 16 * kPer + tx * kPer + n % kPer; }

  __device__ __forceinline__ void load_slice(A* to, const T* first, int64_t stride, int count, int column) {
    for (int i = team.thread; i < kRows * kSlice; i += 256) {
      const int row = i / kSlice, k = i % kSlice;
      const bool real = row < count && column + k < head_dim;
      to[k * kStride + row] = real ? to_acc(first[row * stride + column + k]) : A(0);
    }
  }

  // rows x columns over the head dim. Every thread is done with `left` and `right` when it returns.
  __device__ __forceinline__ Patch<A, kPer> product(const T* rows, int64_t row_stride, int row_count, const T* columns,
                                                    int64_t column_stride, int column_count) {
    Patch<A, kPer> s{};
    for (int column = 0; column < head_dim; column += kSlice) {
      load_slice(left, rows, row_stride, row_count, column);
      load_slice(right, columns, column_stride, column_count, column);
      team.sync();
#pragma unroll
      for (int k = 0; k < kSlice; ++k) {
        const auto a = *reinterpret_cast<const Run<A, kPer>*>(left + k * kStride + ty * kPer);
        const auto b = *reinterpret_cast<const Run<A, kPer>*>(right + k * kStride + tx * kPer);
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
#pragma unroll
          for (int j = 0; j < kPer; ++j) s.at[i][j] += a.at[i] * b.at[j];
        }
      }
      team.sync();
    }
    return s;
  }

  // sums += weights x rows of `from`, over the columns of the tile. Where a row does not see a column, nothing is multiplied, so
  // that what is not finite there stays away from it.
  __device__ __forceinline__ void add_weighted(A (&sums)[kPer][kSums], const Patch<A, kPer>& w, const T* from, int64_t stride,
                                               int count, const Band& band, bool full) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      Run<A, kPer> column;
#pragma unroll
      for (int i = 0; i < kPer; ++i) column.at[i] = w.at[i][j];
      *reinterpret_cast<Run<A, kPer>*>(weights + (tx * kPer + j) * kStride + ty * kPer) = column;
    }
    for (int base = 0; base < kColumns; base += kSlice) {
      for (int i = team.thread; i < kSlice * Shape::kDim; i += 256) {
        const int row = i / Shape::kDim, k = i % Shape::kDim;
        if (k < head_dim) third[i] = base + row < count ? to_acc(from[(base + row) * stride + k]) : A(0);
      }
      team.sync();
#pragma unroll 1
      for (int j = 0; j < kSlice; ++j) {
        const auto a = *reinterpret_cast<const Run<A, kPer>*>(weights + (base + j) * kStride + ty * kPer);
        bool sees[kPer];
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const int row = ty * kPer + i;
          sees[i] = full || (base + j >= band.begin(row) && base + j < band.end(row));
        }
#pragma unroll
        for (int n = 0; n < kSums; n += kPer) {
          if (16 * n >= head_dim) break;
          const auto x = *reinterpret_cast<const Run<A, kPer>*>(third + j * Shape::kDim + column_of_sum(n));
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            if (!sees[i]) continue;
#pragma unroll
            for (int c = 0; c < kPer; ++c) sums[i][n + c] += a.at[i] * x.at[c];
          }
        }
      }
      team.sync();
    }
  }
};

// The largest, or the sum, over the 16 threads that share rows.
template <class A, class F>
__device__ __forceinline__ A over_row(A x, F&& combine) {
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) x = combine(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

template <class T, int kMaxHeadDim, Pass kPass>
__device__ __forceinline__ void generic_tile(const Team<256>& team, const BackwardParams& p, const Scoring<acc_t<T>>& score,
                                             int64_t item, char* shared) {
  using Loop = GenericTile<T, kMaxHeadDim, kPass>;
  using A = typename Loop::A;
  constexpr int kPer = Loop::kPer, kRows = Loop::kRows, kColumns = Loop::kColumns, kSums = Loop::kSums;
  constexpr bool kByKeys = Loop::kByKeys, kForward = kPass == Pass::kForward;
  constexpr A kLog2 = static_cast<A>(1.4426950408889634074);
  const A kInf = static_cast<A>(INFINITY);
  const int64_t heads = kByKeys ? p.num_kv_heads : p.num_heads;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t row_head = item % heads;
  const Tile tile =
      kByKeys ? key_tile_of(p, item / heads, kRows) : tile_of(p, query_slots(p.device, kRows) - 1 - item / heads, kRows);
  const Sequence s = sequence_of(p, tile.sequence);
  const int64_t num_rows = kByKeys ? s.k_len : s.q_len, num_columns = kByKeys ? s.q_len : s.k_len;
  if (tile.first >= num_rows) return;

  Loop loop(team, p, shared);
  const int64_t last = (tile.first + kRows < num_rows ? tile.first + kRows : num_rows) - 1;
  const int count = static_cast<int>(last + 1 - tile.first);
  const Range seen = kByKeys ? visible_queries(p, s, tile.first, last) : visible_keys(p, s, tile.first, last);
  const auto row_of = [&](const ConstHeadRows& rows) {
    return head_row<T>(rows, s.batch, (kByKeys ? s.k_begin : s.q_begin) + tile.first, row_head);
  };
  const auto stat_index = [&](int64_t query, int64_t head) {
    return s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_begin + query;
  };

  A sums[kPer][kSums] = {};
  A top[kPer], total[kPer];                    // forward: the running softmax
  A row_lse[kPer] = {}, row_delta[kPer] = {};  // dq
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    top[i] = -kInf;
    total[i] = A(0);
    const int64_t query = tile.first + loop.ty * kPer + i;
    if (kPass == Pass::kQueries && query < s.q_len) {
      row_lse[i] = static_cast<const A*>(p.lse)[stat_index(query, row_head)] * kLog2;
      row_delta[i] = static_cast<const A*>(p.row_delta)[stat_index(query, row_head)];
    }
  }

  const int64_t first_head = kByKeys ? row_head * group : row_head / group, end_head = first_head + (kByKeys ? group : 1);
  for (int64_t head = first_head; head < end_head; ++head) {
    const auto column_of = [&](const ConstHeadRows& columns, int64_t column) {
      return head_row<T>(columns, s.batch, (kByKeys ? s.q_begin : s.k_begin) + column, head);
    };
    for (int64_t column = seen.begin / kColumns * kColumns; column < seen.end; column += kColumns) {
      const Band band = kByKeys ? keys_see(p, s, tile.first, column) : queries_see(p, s, tile.first, column);
      const bool full = band.is_full(kRows, kColumns);
      const int columns = static_cast<int>(num_columns - column < kColumns ? num_columns - column : kColumns);
      const ConstHeadRows &rows1 = kByKeys ? p.k : p.q, &columns1 = kByKeys ? p.q : p.k;
      auto w = loop.product(row_of(rows1), rows1.seq_stride, count, column_of(columns1, column), columns1.seq_stride, columns);
      Patch<A, kPer> dp;
      if constexpr (kPass == Pass::kQueries || kPass == Pass::kKeys) {
        const ConstHeadRows &rows2 = kByKeys ? p.v : p.dout, &columns2 = kByKeys ? p.dout : p.v;
        dp = loop.product(row_of(rows2), rows2.seq_stride, count, column_of(columns2, column), columns2.seq_stride, columns);
      }
      A column_lse[kPer] = {}, column_delta[kPer] = {};
      if constexpr (kByKeys) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const int64_t query = column + loop.tx * kPer + j;
          if (query >= s.q_len) continue;
          column_lse[j] = static_cast<const A*>(p.lse)[stat_index(query, head)] * kLog2;
          column_delta[j] = static_cast<const A*>(p.row_delta)[stat_index(query, head)];
        }
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int row = loop.ty * kPer + i, begin = band.begin(row), end = band.end(row);
        bool sees[kPer];
        A largest_here = top[i];
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const int at = loop.tx * kPer + j;
          sees[j] = full || (at >= begin && at < end);
          A& x = w.at[i][j];
          if (score.transform) x = score.apply(x);
          if constexpr (kForward) {
            if (!sees[j]) x = -kInf;
            largest_here = largest(largest_here, x);
          } else {
            const A score_here = x;
            x = sees[j] ? power_of_2(x * score.log2_unit - (kByKeys ? column_lse[j] : row_lse[i])) : A(0);
            if constexpr (kPass != Pass::kValues) {
              A ds = x * (dp.at[i][j] - (kByKeys ? column_delta[j] : row_delta[i]));
              if (score.softcap > A(0)) ds *= score.slope(score_here);
              x = sees[j] ? ds : A(0);
            }
          }
        }
        if constexpr (kForward) {
          largest_here = over_row(largest_here, [](A a, A b) { return largest(a, b); });
          const A shift = largest_here == -kInf ? A(0) : largest_here;
          const A factor = power_of_2((top[i] - shift) * score.log2_unit);
          top[i] = largest_here;
          A sum = A(0);
#pragma unroll
          for (int j = 0; j < kPer; ++j) {
            w.at[i][j] = power_of_2((w.at[i][j] - shift) * score.log2_unit);
            sum += w.at[i][j];
          }
          total[i] = total[i] * factor + sum;
#pragma unroll
          for (int n = 0; n < kSums; ++n) sums[i][n] *= factor;
        }
      }
      const ConstHeadRows& third = kForward ? p.v : kPass == Pass::kQueries ? p.k : kPass == Pass::kKeys ? p.q : p.dout;
      loop.add_weighted(sums, w, column_of(third, column), third.seq_stride, columns, band, full);
    }
  }

  const MutableHeadRows& to = kForward ? p.out : kPass == Pass::kQueries ? p.dq : kPass == Pass::kKeys ? p.dk : p.dv;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int row = loop.ty * kPer + i;
    A factor = kPass == Pass::kValues ? A(1) : score.gradient_scale;
    if constexpr (kForward) {
      const A sum = over_row(total[i], [](A a, A b) { return a + b; });
      factor = sum == A(0) ? A(0) : A(1) / sum;  // no key: 0
      if (loop.tx == 0 && row < count) {
        static_cast<A*>(p.lse)[stat_index(tile.first + row, row_head)] = top[i] * score.unit + natural_log(sum);
      }
    }
    if (row >= count) continue;
    T* out = head_row<T>(to, s.batch, (kByKeys ? s.k_begin : s.q_begin) + tile.first + row, row_head);
#pragma unroll
    for (int n = 0; n < kSums; ++n) {
      const int column = loop.column_of_sum(n);
      if (column < loop.head_dim) out[column] = from_acc<T>(sums[i][n] * factor);
    }
  }
}

template <class T, int kMaxHeadDim, Pass kPass>
__global__ void __launch_bounds__(256)
    generic(const __grid_constant__ BackwardParams p, const __grid_constant__ Scoring<acc_t<T>> score, int64_t first_item) {
  const Team<256> team{static_cast<int>(threadIdx.x), 1};
  generic_tile<T, kMaxHeadDim, kPass>(team, p, score, first_item + blockIdx.x, fastlm::cuda::shared_memory());
}

}  // namespace fastlm::sliding_window_attention::cuda
