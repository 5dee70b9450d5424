// Weights streamed from memory: each thread has kStages pieces of 16 bytes under way into shared memory that only it reads, so no
// barrier stands between a block and its stream, and the stream of a phase may begin before the phase does. And what is done with
// the pieces: products with a few tokens. Four lanes share a row of a tile of 8; with 16-bit elements the piece of a lane is two
// operands of the matrix instruction just as it lies (columns are summed in an order of their own, the same for x and W).
#pragma once

#include "core/cuda/device.cuh"
#include "ops/samba_decode_step/cuda/params.h"

namespace fastlm::samba_decode_step::cuda {
namespace {

using fastlm::cuda::from_acc;
using fastlm::cuda::kFullWarp;
using fastlm::cuda::load_param;
using fastlm::cuda::Team;
using fastlm::cuda::to_acc;

using BlockTeam = Team<kThreads>;

template <class T>
constexpr int kPiece = 16 / sizeof(T);  // elements of a piece
template <class T>
constexpr int kTokens = max_tokens(sizeof(T));

template <class T>
struct alignas(16) Piece {
  T x[kPiece<T>];
};

template <class T>
__device__ __forceinline__ Piece<T> load_piece(const T* p) {
  Piece<T> piece;
  *reinterpret_cast<uint4*>(&piece) = *reinterpret_cast<const uint4*>(p);
  return piece;
}

// Elements from `column` on, 0 from `end` on. `vector`: the row may be read up to the end of a piece.
template <class T>
__device__ __forceinline__ Piece<T> load_piece_of(const T* row, int64_t column, int64_t end, bool vector) {
  Piece<T> piece;
  if (vector) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (column < end) raw = *reinterpret_cast<const uint4*>(row + column);
    *reinterpret_cast<uint4*>(&piece) = raw;
    return piece;
  }
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) piece.x[i] = column + i < end ? row[column + i] : from_acc<T>(0);
  return piece;
}

// The weight that a tile of rows belongs to.
__device__ __forceinline__ int weight_of_tile(const Product& p, int row_tile) {
  int i = 0;
  while (i + 1 < p.num_weights && p.use != Use::kGate && row_tile >= p.weights[i + 1].first_tile) ++i;
  return i;
}

// The tiles and chunks that a warp takes: tiles `tile`, `tile + tile_step`, ... and of each the chunks first, first + step, ... .
struct Share {
  int tile, tile_step, chunk, chunk_step;
};

template <class T>
class WeightStream {
 public:
  // `slots`: this thread's part of the stages, kThreads pieces between stages.
  __device__ __forceinline__ void begin(const Product& p, const Share& share, Piece<T>* slots, int thread) {
    slots_ = slots;
    lane_ = thread % 32;
    share_ = share;
    tiles_ = p.row_tiles * p.splits;
    tile_ = share.tile - share.tile_step;
    issue_ = take_ = 0;
    next_tile(p);
    for (int i = 0; i < kStages; ++i) issue(p);
  }

  // The next piece, once it is there. `advance` starts the piece that takes its place, when this one has been used.
  __device__ __forceinline__ Piece<T> take() {
    fastlm::cuda::wait_copies<kStages - 1>();
    return load_piece<T>(slots_[take_ * kThreads].x);
  }
  __device__ __forceinline__ void advance(const Product& p) {
    take_ = take_ + 1 == kStages ? 0 : take_ + 1;
    issue(p);
  }

 private:
  __device__ __forceinline__ void next_tile(const Product& p) {
    do {
      tile_ += share_.tile_step;
      if (tile_ >= tiles_) return;
      const int split = tile_ / p.row_tiles, row_tile = tile_ - split * p.row_tiles;
      chunk_ = split * p.split_chunks + share_.chunk;
      end_ = min((split + 1) * p.split_chunks, p.chunks);
      int row = lane_ / 4;
      int i = weight_of_tile(p, row_tile);
      if (p.use == Use::kGate) {  // four rows of each of two weights
        i = row / 4;
        row = row_tile * (kTileRows / 2) + row % 4;
      } else {
        row += (row_tile - p.weights[i].first_tile) * kTileRows;
      }
      const Weight& w = p.weights[i];
      row_ = static_cast<const T*>(w.data) + min(static_cast<int64_t>(row), w.rows - 1) * w.stride;
      vector_ = w.vector;
    } while (chunk_ >= end_);
  }

  __device__ __forceinline__ void issue(const Product& p) {
    if (tile_ < tiles_) {
      const int64_t column = int64_t{chunk_} * chunk_columns(sizeof(T)) + lane_ % 4 * kPiece<T>;
      Piece<T>* const to = slots_ + issue_ * kThreads;
      if (vector_) {
        const bool valid = column < p.columns;
        fastlm::cuda::copy_async<16>(to, valid ? row_ + column : row_, valid);
      } else {
        *to = load_piece_of(row_, column, p.columns, false);
      }
      chunk_ += share_.chunk_step;
      if (chunk_ >= end_) next_tile(p);
    }
    fastlm::cuda::commit_copies();
    issue_ = issue_ + 1 == kStages ? 0 : issue_ + 1;
  }

  Piece<T>* slots_;
  const T* row_;
  Share share_;
  int lane_, tiles_, tile_, chunk_, end_, issue_, take_;
  bool vector_;
};

// Where the tokens of a group lie: x (tokens, columns), in shared or global memory.
template <class T>
struct TokenRows {
  const T* x;
  int64_t stride;
  int count;
  bool vector;
};

// Sums of up to kTokens tokens times the 8 rows of a tile, by a warp.
template <class T>
struct TileSums {
  using A = acc_t<T>;
  A d[4] = {};  // 16-bit: the matrix instruction's; else this lane's share of tokens 0 to 3 times row lane / 4

  // The tokens' part of a chunk; fetched a chunk ahead, as it may come from far.
  struct Tokens {
    Piece<T> x[sizeof(T) == 2 ? 2 : 4];
  };
  static __device__ __forceinline__ Tokens load_tokens(const TokenRows<T>& rows, int chunk, int64_t columns, int lane) {
    Tokens t;
    const int64_t column = int64_t{chunk} * chunk_columns(sizeof(T)) + lane % 4 * kPiece<T>;
    constexpr int kCount = sizeof(T) == 2 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int token = sizeof(T) == 2 ? lane / 4 + 8 * i : i;
      t.x[i] = load_piece_of(rows.x + token * rows.stride, column, token < rows.count ? columns : 0, rows.vector);
    }
    return t;
  }

  __device__ __forceinline__ void add(const Tokens& t, const Piece<T>& w) {
    if constexpr (sizeof(T) == 2) {
      const uint4 x0 = *reinterpret_cast<const uint4*>(&t.x[0]), x1 = *reinterpret_cast<const uint4*>(&t.x[1]);
      const uint4 b = *reinterpret_cast<const uint4*>(&w);
      const uint32_t first[4] = {x0.x, x1.x, x0.y, x1.y}, second[4] = {x0.z, x1.z, x0.w, x1.w};
      fastlm::cuda::mma_m16n8k16<T>(d, first, b.x, b.y);
      fastlm::cuda::mma_m16n8k16<T>(d, second, b.z, b.w);
    } else {
#pragma unroll
      for (int token = 0; token < 4; ++token) {
#pragma unroll
        for (int i = 0; i < kPiece<T>; ++i) d[token] += to_acc(t.x[token].x[i]) * to_acc(w.x[i]);
      }
    }
  }

  // Into sums[token][row]; called by a whole warp.
  __device__ __forceinline__ void put(A* sums, int lane) {
    const int g = lane / 4, c = lane % 4;
    if constexpr (sizeof(T) == 2) {
      sums[g * kTileRows + 2 * c] = d[0];
      sums[g * kTileRows + 2 * c + 1] = d[1];
      sums[(g + 8) * kTileRows + 2 * c] = d[2];
      sums[(g + 8) * kTileRows + 2 * c + 1] = d[3];
    } else {
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        d[token] += __shfl_xor_sync(kFullWarp, d[token], 1);
        d[token] += __shfl_xor_sync(kFullWarp, d[token], 2);
      }
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        if (c == token) sums[token * kTileRows + g] = d[token];
      }
    }
  }
};

// One tile: chunks [begin, end) of it that are this warp's.
template <class T>
__device__ __forceinline__ void multiply_tile(const Product& p, WeightStream<T>& stream, const TokenRows<T>& rows, int begin,
                                              int end, int step, int lane, TileSums<T>& sums) {
  if (begin >= end) return;
  auto tokens = TileSums<T>::load_tokens(rows, begin, p.columns, lane);
  for (int chunk = begin; chunk < end; chunk += step) {
    const auto now = tokens;
    if (chunk + step < end) tokens = TileSums<T>::load_tokens(rows, chunk + step, p.columns, lane);
    const Piece<T> w = stream.take();
    sums.add(now, w);
    stream.advance(p);
  }
}

}  // namespace
}  // namespace fastlm::samba_decode_step::cuda
