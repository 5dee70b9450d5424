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

// 16 bytes of a row.
template <class T>
struct Piece {
  uint4 raw;

  __device__ __forceinline__ acc_t<T> operator[](int i) const {  // `i` known when compiled
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if constexpr (sizeof(T) == 2) {
      return to_acc(T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const uint64_t bits = words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32;
      double x;
      __builtin_memcpy(&x, &bits, sizeof(x));
      return x;
    }
  }
};

template <class T>
__device__ __forceinline__ Piece<T> load_piece(const void* p) {
  return {*static_cast<const uint4*>(p)};
}

// The first `count` elements at p, then 0; one by one.
template <class T>
__device__ __forceinline__ Piece<T> gather_piece(const T* p, int count) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) {
    const T x = i < count ? p[i] : from_acc<T>(0);
    if constexpr (sizeof(T) == 2) {
      words[i / 2] |= static_cast<uint32_t>(x.bits) << i % 2 * 16;
    } else {
      __builtin_memcpy(words + i * sizeof(T) / 4, &x, sizeof(T));
    }
  }
  return {make_uint4(words[0], words[1], words[2], words[3])};
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
struct Pieces {
  Piece<T> x[kPieces];
};

template <class T>
class WeightStream {
 public:
  static constexpr int kColumns = chunk_columns(sizeof(T));

  // `slots`: this thread's part of the stages, kThreads pieces apart.
  __device__ __forceinline__ void begin(const Product& p, const Share& share, Piece<T>* slots, int thread) {
    slots_ = slots;
    lane_ = thread % 32;
    share_ = share;
    tiles_ = p.row_tiles * p.splits;
    tile_ = share.tile - share.tile_step;
    stage_ = 0;
    next_tile(p);
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      issue(p, i);
    }
  }

  // The next chunk's pieces, once they are there.
  __device__ __forceinline__ Pieces<T> take() {
    fastlm::cuda::wait_copies<kStages - 1>();
    Pieces<T> pieces;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces.x[i] = load_piece<T>(slots_ + (stage_ * kPieces + i) * kThreads);
    return pieces;
  }
  // Starts what takes their place; called when they have been used.
  __device__ __forceinline__ void advance(const Product& p) {
    issue(p, stage_);
    stage_ = (stage_ + 1) % kStages;
  }

 private:
  __device__ __forceinline__ void next_tile(const Product& p) {
    do {
      tile_ += share_.tile_step;
      if (tile_ >= tiles_) return;
      const int split = p.splits == 1 ? 0 : tile_ / p.row_tiles, row_tile = tile_ - split * p.row_tiles;
      const int begin = split * p.split_chunks + share_.chunk, end = min((split + 1) * p.split_chunks, p.chunks);
      int row = lane_ / 4;
      int i = weight_of_tile(p, row_tile);
      if (p.use == Use::kGate) {  // four rows of each of two weights
        i = row / 4;
        row = row_tile * (kTileRows / 2) + row % 4;
      } else {
        row += (row_tile - p.weights[i].first_tile) * kTileRows;
      }
      const Weight& w = p.weights[i];
      const int column = begin * kColumns + lane_ % 4 * kPiece<T>;
      from_ = static_cast<const T*>(w.data) + min(static_cast<int64_t>(row), w.rows - 1) * w.stride + column;
      left_ = static_cast<int>(p.columns) - column;
      vector_ = w.vector;
      chunks_left_ = end - begin;
    } while (chunks_left_ <= 0);
  }

  __device__ __forceinline__ void issue(const Product& p, int stage) {
    if (tile_ < tiles_) {
      Piece<T>* const to = slots_ + stage * kPieces * kThreads;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int offset = i * 4 * kPiece<T>;
        if (vector_) {
          fastlm::cuda::copy_async<16>(to + i * kThreads, from_ + offset, offset < left_);
        } else {
          to[i * kThreads] = gather_piece(from_ + offset, left_ - offset);
        }
      }
      from_ += share_.chunk_step * kColumns;
      left_ -= share_.chunk_step * kColumns;
      chunks_left_ -= share_.chunk_step;
      if (chunks_left_ <= 0) next_tile(p);
    }
    fastlm::cuda::commit_copies();
  }

  Piece<T>* slots_;
  const T* from_ = nullptr;  // this lane's part of the chunk to be issued
  Share share_;
  int lane_, tiles_, tile_, stage_;
  int chunks_left_ = 0, left_ = 0;
  bool vector_ = false;
};

// Where the tokens of a group lie: x (count, columns), in shared or global memory. `vector`: 16 bytes at a time.
template <class T>
struct TokenRows {
  const T* x;
  int64_t stride;
  int columns, count;
  bool vector;
};

// Sums of up to kTokens tokens times the 8 rows of a tile, by a warp.
template <class T>
struct TileSums {
  using A = acc_t<T>;
  static constexpr int kHeld =
      sizeof(T) == 2 ? 2 : kTokens<T>;  // tokens of which a lane holds pieces: lane / 4 and 8 more, or all
  A d[4] = {};  // 16-bit: the matrix instruction's; else this lane's share of tokens 0 to 3 times row lane / 4

  struct Tokens {
    Piece<T> x[kHeld][kPieces];
  };

  // This lane's part of a chunk of the tokens; `left`: columns from there on.
  template <bool kVector>
  static __device__ __forceinline__ void load_tokens(const T* const (&x)[kHeld], const int (&left)[kHeld], Tokens& t) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int at = i * 4 * kPiece<T>, count = left[k] - at;
        if constexpr (kVector) {
          t.x[k][i].raw = make_uint4(0, 0, 0, 0);
          if (count > 0) t.x[k][i] = load_piece<T>(x[k] + at);
        } else {
          t.x[k][i] = gather_piece(x[k] + at, count);
        }
      }
    }
  }

  __device__ __forceinline__ void add(const Tokens& t, const Pieces<T>& w) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if constexpr (sizeof(T) == 2) {
        const uint4 x0 = t.x[0][i].raw, x1 = t.x[1][i].raw, b = w.x[i].raw;
        const uint32_t first[4] = {x0.x, x1.x, x0.y, x1.y}, second[4] = {x0.z, x1.z, x0.w, x1.w};
        fastlm::cuda::mma_m16n8k16<T>(d, first, b.x, b.y);
        fastlm::cuda::mma_m16n8k16<T>(d, second, b.z, b.w);
      } else {
#pragma unroll
        for (int token = 0; token < kHeld; ++token) {
#pragma unroll
          for (int j = 0; j < kPiece<T>; ++j) d[token] += t.x[token][i][j] * w.x[i][j];
        }
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
      for (int token = 0; token < kHeld; ++token) {
        d[token] += __shfl_xor_sync(kFullWarp, d[token], 1);
        d[token] += __shfl_xor_sync(kFullWarp, d[token], 2);
        if (c == token) sums[token * kTileRows + g] = d[token];
      }
    }
  }
};

// Chunks begin, begin + step, ... of a tile, as far as they lie before `end`. The tokens' part is fetched a chunk ahead, as it
// may come from far.
template <class T, bool kVector>
__device__ __forceinline__ void multiply_chunks(const Product& p, WeightStream<T>& stream, const TokenRows<T>& rows, int begin,
                                                int end, int step, int lane, TileSums<T>& sums) {
  using Sums = TileSums<T>;
  constexpr int kColumns = chunk_columns(sizeof(T));
  const T* x[Sums::kHeld];
  int left[Sums::kHeld];
  const int column = begin * kColumns + lane % 4 * kPiece<T>;
#pragma unroll
  for (int k = 0; k < Sums::kHeld; ++k) {
    const int token = sizeof(T) == 2 ? lane / 4 + 8 * k : k;
    x[k] = rows.x + token * rows.stride + column;
    left[k] = token < rows.count ? rows.columns - column : 0;
  }
  constexpr bool kAhead = sizeof(T) == 2;  // wider elements would need too many registers
  typename Sums::Tokens now, next;
  if (kAhead) Sums::template load_tokens<kVector>(x, left, next);
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk += step) {
    if (kAhead) now = next;
    if (!kAhead) Sums::template load_tokens<kVector>(x, left, now);
#pragma unroll
    for (int k = 0; k < Sums::kHeld; ++k) {
      x[k] += step * kColumns;
      left[k] -= step * kColumns;
    }
    if (kAhead && chunk + step < end) Sums::template load_tokens<kVector>(x, left, next);
    const Pieces<T> w = stream.take();
    sums.add(now, w);
    stream.advance(p);
  }
}

template <class T>
__device__ __forceinline__ void multiply_tile(const Product& p, WeightStream<T>& stream, const TokenRows<T>& rows, int begin,
                                              int end, int step, int lane, TileSums<T>& sums) {
  if (begin >= end) return;
  if (rows.vector) {
    multiply_chunks<T, true>(p, stream, rows, begin, end, step, lane, sums);
  } else {
    multiply_chunks<T, false>(p, stream, rows, begin, end, step, lane, sums);
  }
}

}  // namespace
}  // namespace fastlm::samba_decode_step::cuda
