// What the forward and the backward tiles on matrix units share: tiles of 16-bit rows in shared memory, products of a warp out of
// them, and which pairs of a tile see each other.
//
// A tile is (rows, kDim) with columns past the head dim zero. Pieces of 16 bytes are permuted within each row by the row's
// number, so that eight rows of one column, what ldmatrix reads at a time, lie in different banks.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/cuda/band.cuh"
#include "ops/sliding_window_attention/cuda/scoring.cuh"
#include "ops/sliding_window_attention/cuda/sequences.cuh"

namespace fastlm::sliding_window_attention::cuda {

using fastlm::cuda::copy_async;
using fastlm::cuda::kFullWarp;
using fastlm::cuda::load_matrix_x4;
using fastlm::cuda::load_matrix_x4_transposed;
using fastlm::cuda::mma_m16n8k16;
using fastlm::cuda::pack_pair;
using fastlm::cuda::Team;
using fastlm::cuda::to_acc;

constexpr float kLog2e = 1.4426950408889634f;

// What tiles need beside Params; filled on the host.
struct TileOptions {
  Scoring<float> score;
  bool vectors;  // see vectors_apply
};

struct alignas(16) Piece {
  uint32_t word[4];
};

template <int kDim>
struct Layout {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kPieces = kDim / 8;  // per row

  static __device__ __forceinline__ int at(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }
};

// Calls f(offset in the tile, row, first column) for the pieces that this thread copies.
template <int kRows, int kDim, int kThreads, class F>
__device__ __forceinline__ void for_own_pieces(int thread, F&& f) {
  using L = Layout<kDim>;
  static_assert(kThreads % L::kPieces == 0 && kRows % (kThreads / L::kPieces) == 0);
  const int piece = thread % L::kPieces;
#pragma unroll
  for (int i = 0; i < kRows; i += kThreads / L::kPieces) {
    const int row = thread / L::kPieces + i;
    f(L::at(row, piece), row, piece * 8);
  }
}

// The element of `rows` where this thread begins to copy a tile.
template <int kDim, class T, int kThreads>
__device__ __forceinline__ const T* own_piece(const Team<kThreads>& team, const T* rows, int64_t stride) {
  constexpr int kPieces = Layout<kDim>::kPieces;
  return rows + team.thread / kPieces * stride + team.thread % kPieces * 8;
}

// Begins to copy a tile of which `count` rows exist; the others read as zero. `x`: own_piece. `vectors`: pieces of 16 bytes in
// the background, otherwise element by element and at once.
template <int kRows, int kDim, class T, int kThreads>
__device__ __forceinline__ void load_tile(const Team<kThreads>& team, char* tile, const T* x, int64_t stride, int count,
                                          int head_dim, bool vectors) {
  using L = Layout<kDim>;
  constexpr int kStep = kThreads / L::kPieces;
  static_assert(kThreads % L::kPieces == 0 && kRows % kStep == 0);
  const int piece = team.thread % L::kPieces, first_row = team.thread / L::kPieces;
  const int64_t step = kStep * stride;
  if (vectors && count >= kRows && head_dim == kDim) {
#pragma unroll
    for (int i = 0; i < kRows; i += kStep, x += step) copy_async<16>(tile + L::at(first_row + i, piece), x);
    return;
  }
  const int last = 8 * piece < head_dim ? count : 0;
  if (vectors) {
#pragma unroll 2
    for (int row = first_row; row < kRows; row += kStep, x += step) copy_async<16>(tile + L::at(row, piece), x, row < last);
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < kRows; row += kStep, x += step) {
    Piece words{};
    if (row < last) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * piece + i < head_dim) words.word[i / 2] |= static_cast<uint32_t>(x[i].bits) << (i % 2 * 16);
      }
    }
    *reinterpret_cast<Piece*>(tile + L::at(row, piece)) = words;
  }
}

// ---- values that are not finite -------------------------------------------------------------------------------------------
//
// 0 * NaN is NaN: where rows of a tile see different keys, a value that is not finite would reach rows that do not see it. Such
// tiles are found while they are copied. Every row that sees the value gets it added, then it is replaced by zero. Zero products
// leave sums as they are, so all other rows keep their bits.

template <class T>
constexpr uint32_t kExponents = DTypeOf<T>::value == DType::kBFloat16 ? 0x7f807f80u : 0x7c007c00u;

// Bit 15 or bit 31 set where an element of the pair is infinite or NaN.
template <class T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kLowest = DTypeOf<T>::value == DType::kBFloat16 ? 0x00800080u : 0x04000400u;
  return ((pair & kExponents<T>)+kLowest) & 0x80008000u;
}

// Whether something this thread copied is not finite. Its copies must have arrived.
template <class T, int kRows, int kDim, int kThreads>
__device__ __forceinline__ bool found_not_finite(const Team<kThreads>& team, const char* tile) {
  uint32_t found = 0;
  for_own_pieces<kRows, kDim, kThreads>(team.thread, [&](int at, int, int) {
    const Piece piece = *reinterpret_cast<const Piece*>(tile + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= not_finite<T>(piece.word[i]);
  });
  return found != 0;
}

template <class T, int kRows, int kDim, int kThreads>
__device__ __forceinline__ void replace_not_finite(const Team<kThreads>& team, char* tile) {
  for_own_pieces<kRows, kDim, kThreads>(team.thread, [&](int at, int, int) {
    Piece& piece = *reinterpret_cast<Piece*>(tile + at);
    for (int i = 0; i < 4; ++i) {
      const uint32_t found = not_finite<T>(piece.word[i]);
      piece.word[i] &= ~((found >> 15) * 0xffffu);
    }
  });
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Where lane reads rows for load_matrix_x4: as the left operand (row-major) or, transposed, as the right operand out of rows of
// the depth; and as the right operand out of rows of its columns.
struct LaneRows {
  int row_a, piece_a;
  int row_b, piece_b;
};
__device__ __forceinline__ LaneRows lane_rows(int lane) {
  return {lane & 15, lane >> 4, (lane & 7) + (lane >> 4 << 3), (lane >> 3) & 1};
}

// s[m][n] = rows a (16 kM) times rows b (8 kN), over the head dim: s = a b^T. `a`, `b`: tiles at rows that are multiples of 8.
template <class T, int kDim, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&s)[kM][kN][4], const char* a, const char* b, const LaneRows& lanes) {
  using L = Layout<kDim>;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
  const char* lane_a = a + lanes.row_a * L::kRowBytes;
  const char* lane_b = b + lanes.row_b * L::kRowBytes;
  const int swizzle_a = (lanes.piece_a ^ (lanes.row_a & 7)) << 4, swizzle_b = (lanes.piece_b ^ (lanes.row_b & 7)) << 4;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrix_x4(left[m], lane_a + (swizzle_a ^ k << 5) + m * 16 * L::kRowBytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_matrix_x4(right, lane_b + (swizzle_b ^ k << 5) + n * 8 * L::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(s[m][n], left[m], right[0], right[1]);
        mma_m16n8k16<T>(s[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Weights as left operands: left[m][k] holds columns 16 k to 16 k + 15.
template <int kM, int kN>
using Weights = uint32_t[kM][kN / 2][4];

template <class T, int kM, int kN>
__device__ __forceinline__ void pack_weights(uint32_t (&left)[kM][kN / 2][4], const float (&w)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
      left[m][k][0] = pack_pair<T>(w[m][2 * k][0], w[m][2 * k][1]);
      left[m][k][1] = pack_pair<T>(w[m][2 * k][2], w[m][2 * k][3]);
      left[m][k][2] = pack_pair<T>(w[m][2 * k + 1][0], w[m][2 * k + 1][1]);
      left[m][k][3] = pack_pair<T>(w[m][2 * k + 1][2], w[m][2 * k + 1][3]);
    }
  }
}

// sum[m][n] += weights (16 kM, 16 kK) times the tile (16 kK, kDim).
template <class T, int kDim, int kM, int kK>
__device__ __forceinline__ void add_weighted(float (&sum)[kM][kDim / 8][4], const uint32_t (&left)[kM][kK][4], const char* tile,
                                             const LaneRows& lanes) {
  using L = Layout<kDim>;
  const char* lane_row = tile + lanes.row_a * L::kRowBytes;
  const int swizzle = (lanes.piece_a ^ (lanes.row_a & 7)) << 4;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, lane_row + (swizzle ^ n << 5) + k * 16 * L::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(sum[m][2 * n], left[m][k], right[0], right[1]);
        mma_m16n8k16<T>(sum[m][2 * n + 1], left[m][k], right[2], right[3]);
      }
    }
  }
}

// ---- who sees whom --------------------------------------------------------------------------------------------------------

// Elements of s that are not in the band become `other`. `row`: of the lane's first element.
template <int kM, int kN>
__device__ __forceinline__ void mask(float (&s)[kM][kN][4], const Band& band, int row, int lane, float other) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = band.begin(row + 16 * m + 8 * half), end = band.end(row + 16 * m + 8 * half);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * (lane & 3) + i;
          if (column < begin || column >= end) s[m][n][2 * half + i] = other;
        }
      }
    }
  }
}

// Adds to each row's sums what is not finite in the rows of the tile (kColumns, kDim) that it sees: the value, or NaN for it.
template <class T, int kDim, int kColumns, bool kAsNan, int kM>
__device__ __forceinline__ void add_not_finite(float (&sum)[kM][kDim / 8][4], const char* tile, const Band& band, int row,
                                               int lane) {
#pragma unroll 1
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + Layout<kDim>::at(j, n) + 4 * (lane & 3));
      const uint32_t found = not_finite<T>(pair);
      if (found == 0) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((found >> (15 + 16 * i) & 1) == 0) continue;
        const float x = to_acc(T{static_cast<uint16_t>(pair >> (16 * i))});
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = row + 16 * m + 8 * half;
            if (j >= band.begin(r) && j < band.end(r)) sum[m][n][2 * half + i] += kAsNan ? x - x : x;
          }
        }
      }
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------------

// Rows of sums, times one factor each, to global memory: through `tile` (16 kM rows that only this warp uses), so that stores are
// wide. `count`: rows that exist.
template <class T, int kDim, int kM>
__device__ __forceinline__ void store_rows(const float (&sum)[kM][kDim / 8][4], const float (&factor)[kM][2], char* tile, T* to,
                                           int64_t stride, int count, int head_dim, bool vectors, int lane) {
  using L = Layout<kDim>;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + lane / 4;
      const float f = factor[m][half];
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(tile + L::at(row, n) + 4 * (lane & 3)) =
            pack_pair<T>(sum[m][n][2 * half] * f, sum[m][n][2 * half + 1] * f);
      }
    }
  }
  __syncwarp();
  if (vectors) {
    for_own_pieces<16 * kM, kDim, 32>(lane, [&](int at, int row, int column) {
      if (row < count && column < head_dim) {
        *reinterpret_cast<Piece*>(to + row * stride + column) = *reinterpret_cast<const Piece*>(tile + at);
      }
    });
    return;
  }
#pragma unroll 1
  for (int row = 0; row < 16 * kM && row < count; ++row) {
    for (int column = lane; column < head_dim; column += 32) {
      to[row * stride + column] = *reinterpret_cast<const T*>(tile + L::at(row, column / 8) + 2 * (column % 8));
    }
  }
}

}  // namespace fastlm::sliding_window_attention::cuda
