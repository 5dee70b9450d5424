// Tiles of (positions x columns) on their way from global to shared memory; columns are channels (u, delta, z) or states (B, C).
// A tile keeps the order of its tensor: [position][column] where columns are contiguous, [column][position] where positions are.
// Full pieces of 16 bytes are copied in the background; ragged, unaligned or scattered ones element by element.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/selective_scan/cuda/forward_call.h"

namespace fastlm::selective_scan::cuda {

template <class T, int kSteps, int kColumns>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr bool kRowVectors = kColumns % kVector == 0, kColumnVectors = kSteps % kVector == 0;
  // Rows of positions are 16 bytes longer: columns then lie in different banks.
  static constexpr int kColumnStride = kSteps + (kColumnVectors ? kVector : 0);
  static constexpr int kElements = kColumns * kColumnStride > kSteps* kColumns ? kColumns * kColumnStride : kSteps * kColumns;
  static constexpr int kBytes = (kElements * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
};

// What is staged: `data` is the first position and column of the tile.
template <class T>
struct Source {
  const T* data;
  int64_t step_stride, column_stride;
  Order order;
};

// Steps and columns beyond `steps` and `columns` become zeros. Followed by commit_copies, and a barrier before the tile is read.
template <int kSteps, int kColumns, class T, int kThreads>
__device__ __forceinline__ void stage(const fastlm::cuda::Team<kThreads>& team, char* to, const Source<T>& from, int steps,
                                      int columns) {
  using Shape = Tile<T, kSteps, kColumns>;
  constexpr int kVector = Shape::kVector;
  T* tile = reinterpret_cast<T*>(to);
  const auto aligned = [&](int64_t stride) { return (reinterpret_cast<uintptr_t>(from.data) | stride * sizeof(T)) % 16 == 0; };
  if constexpr (Shape::kRowVectors) {
    if (from.order == Order::kRows && columns % kVector == 0 && aligned(from.step_stride)) {
      constexpr int kPieces = kColumns / kVector;
#pragma unroll 1
      for (int i = team.thread; i < kSteps * kPieces; i += kThreads) {
        const int t = i / kPieces, column = i % kPieces * kVector;
        const bool valid = t < steps && column < columns;
        fastlm::cuda::copy_async<16>(tile + t * kColumns + column, valid ? from.data + t * from.step_stride + column : from.data,
                                     valid);
      }
      return;
    }
  }
  if constexpr (Shape::kColumnVectors) {
    if (from.order == Order::kColumns && steps == kSteps && aligned(from.column_stride)) {
      constexpr int kPieces = kSteps / kVector;
#pragma unroll 1
      for (int i = team.thread; i < kColumns * kPieces; i += kThreads) {
        const int column = i / kPieces, t = i % kPieces * kVector;
        const bool valid = column < columns;
        fastlm::cuda::copy_async<16>(tile + column * Shape::kColumnStride + t,
                                     valid ? from.data + column * from.column_stride + t : from.data, valid);
      }
      return;
    }
  }
  const bool by_columns = from.order == Order::kColumns;
#pragma unroll 1
  for (int i = team.thread; i < kSteps * kColumns; i += kThreads) {
    const int t = by_columns ? i % kSteps : i / kColumns, column = by_columns ? i / kSteps : i % kColumns;
    T x{};
    if (t < steps && column < columns) x = from.data[t * from.step_stride + column * from.column_stride];
    tile[by_columns ? column * Shape::kColumnStride + t : t * kColumns + column] = x;
  }
}

// What one thread copies of every whole tile of a tensor, where all pieces are aligned: found once, then moved from tile to tile.
template <class T, int kSteps, int kColumns, int kThreads>
struct Mover {
  using Shape = Tile<T, kSteps, kColumns>;
  static constexpr int kVector = Shape::kVector, kPieces = kSteps * kColumns / kVector;
  static constexpr int kEach = (kPieces + kThreads - 1) / kThreads;
  static constexpr bool kPossible = Shape::kRowVectors && Shape::kColumnVectors && (kPieces % kThreads == 0 || kEach == 1);
  const T* from;

  // Whether this way is open for a tensor: the first position of the first tile, and whole pieces of columns.
  static __device__ __forceinline__ bool applies(const Source<T>& source, int columns) {
    if (!kPossible || source.order == Order::kScattered) return false;
    const int64_t stride = source.order == Order::kRows ? source.step_stride : source.column_stride;
    return (reinterpret_cast<uintptr_t>(source.data) | stride * sizeof(T)) % 16 == 0 && columns == kColumns;
  }

  __device__ __forceinline__ Mover(const Source<T>& source, int thread) {
    if (source.order == Order::kRows) {
      constexpr int kRow = kColumns / kVector > 0 ? kColumns / kVector : 1;
      from = source.data == nullptr ? nullptr : source.data + thread / kRow * source.step_stride + thread % kRow * kVector;
    } else {
      constexpr int kColumn = kSteps / kVector > 0 ? kSteps / kVector : 1;
      from = source.data + thread / kColumn * source.column_stride + thread % kColumn * kVector;
    }
  }

  // Copies this thread's pieces of the tile and moves on to the next tile.
  __device__ __forceinline__ void copy(char* to, const Source<T>& source, int thread) {
    if (kPieces % kThreads == 0 || thread < kPieces) {
      T* tile = reinterpret_cast<T*>(to);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int piece = thread + i * kThreads;
        if (source.order == Order::kRows) {
          constexpr int kRow = kColumns / kVector > 0 ? kColumns / kVector : 1;
          fastlm::cuda::copy_async<16>(tile + piece * kVector, from + i * (kThreads / kRow) * source.step_stride);
        } else {
          constexpr int kColumn = kSteps / kVector > 0 ? kSteps / kVector : 1;
          fastlm::cuda::copy_async<16>(tile + piece / kColumn * Shape::kColumnStride + piece % kColumn * kVector,
                                       from + i * (kThreads / kColumn) * source.column_stride);
        }
      }
    }
    from += kSteps * source.step_stride;
  }
};

// kCount (2 or 4, or 8 of 16 bits) neighbouring elements by one read; `from` is aligned to all of them.
template <int kCount, class T>
__device__ __forceinline__ void load_elements(acc_t<T> (&to)[kCount], const T* from) {
  constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  static_assert(sizeof(T) <= 4 && (kWords == 1 || kWords == 2 || kWords == 4));
  uint32_t word[kWords];
  if constexpr (kWords == 1) {
    word[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    word[0] = x.x, word[1] = x.y;
  } else {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(word[i]);
    } else {
      to[i] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
    }
  }
}

// Reads a staged tile.
template <class T, int kSteps, int kColumns>
struct Staged {
  const T* tile;
  int step_stride, column_stride;

  __device__ __forceinline__ Staged(const char* from, Order order)
      : tile(reinterpret_cast<const T*>(from)),
        step_stride(order == Order::kColumns ? 1 : kColumns),
        column_stride(order == Order::kColumns ? Tile<T, kSteps, kColumns>::kColumnStride : 1) {}

  __device__ __forceinline__ acc_t<T> at(int t, int column) const {
    return fastlm::cuda::to_acc(tile[t * step_stride + column * column_stride]);
  }
};

}  // namespace fastlm::selective_scan::cuda
