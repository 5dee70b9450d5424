// Stages of 16-bit operands in shared memory: kLines (of what is not summed) x kDepth, as pieces of 16 bytes, read by ldmatrix. A
// stage keeps the order of its tensor; pieces are permuted within a row of it so that the eight that a phase of ldmatrix reads or
// of cp.async writes lie in different banks.
// Whatever is out of range is zero. Pieces that are aligned and whole are copied in the background, others element by element.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/gemm/problem.h"
#include "core/cuda/gemm/tiles.cuh"

namespace fastlm::cuda::gemm {

template <int kTileLines, int kTileDepth, int kTeam>
struct Stage {
  static constexpr int kLines = kTileLines, kDepth = kTileDepth, kBytes = kLines * kDepth * 2, kThreads = kTeam;
  static constexpr int kEach = kBytes / 16 / kThreads;  // pieces of a thread
  static_assert((kDepth == 32 || kDepth == 64) && kLines % 64 % 32 == 0 && kEach * kThreads * 16 == kBytes);

  // Offset of the piece that holds this element.
  template <Layout kLayout>
  static __device__ __forceinline__ int at(int line, int depth) {
    if constexpr (kLayout == Layout::kDepth) {
      return line * (2 * kDepth) + ((depth / 8 ^ (kDepth == 32 ? line / 2 & 3 : line & 7)) << 4);
    } else {
      static_assert(kLines >= 64);
      return depth * (2 * kLines) + ((line / 8 ^ (depth & 7)) << 4);
    }
  }

  // 16 lines x 16 of depth as operand A of mma.sync (or, by kB, as two operands B of eight lines).
  template <Layout kLayout, bool kB>
  static __device__ __forceinline__ void fragment(uint32_t (&r)[4], const char* stage, int line, int depth, int lane) {
    const int low = lane & 7, middle = (lane >> 3 & 1) * 8, high = (lane >> 4) * 8;
    if constexpr (kLayout == Layout::kDepth) {
      load_matrix_x4(r, stage + at<kLayout>(line + low + (kB ? high : middle), depth + (kB ? middle : high)));
    } else {  // a row of a matrix is a step of depth
      load_matrix_x4_transposed(r, stage + at<kLayout>(line + (kB ? high : middle), depth + low + (kB ? middle : high)));
    }
  }
};

// Eight elements, of which the first `count` exist, one after the other.
template <class T>
__device__ __forceinline__ void stage_elements(char* to, const T* from, int64_t count) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(to)[i] = i < count ? from[i] : T{};
}

// Whether pieces of an operand are aligned. `across`: elements along contiguous memory, of which pieces are cut.
__device__ __forceinline__ bool wide_pieces(const Matrix& m, int64_t across) {
  return ((reinterpret_cast<uintptr_t>(m.data) / 2) | m.line_stride | m.group_stride | across) % 8 == 0;
}

// What a thread copies of an operand whose depth is contiguous: the same piece of several lines.
template <class T, class Stage>
struct DepthOperand {
  static constexpr int kPieces = Stage::kDepth / 8, kStep = Stage::kThreads / kPieces;  // of a line; lines of the threads
  const T* from[Stage::kEach];
  int exists;  // a bit for each
  int64_t depth;
  bool wide;

  // `find(line)`: its first element, or null where there is none.
  template <class Find>
  __device__ __forceinline__ DepthOperand(const Matrix& m, int64_t depth, int thread, Find&& find)
      : exists(0), depth(depth), wide(wide_pieces(m, depth)) {
#pragma unroll
    for (int i = 0; i < Stage::kEach; ++i) {
      const T* const line = find(thread / kPieces + kStep * i);
      exists |= (line != nullptr) << i;
      from[i] = line != nullptr ? line : static_cast<const T*>(m.data);
    }
  }

  __device__ __forceinline__ void copy(char* stage, int64_t k, int thread) {
    const int64_t first = k + thread % kPieces * 8, count = depth - first;
    const auto to = [&](int i) {
      return stage + Stage::template at<Layout::kDepth>(thread / kPieces + kStep * i, thread % kPieces * 8);
    };
    if (wide) {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) copy_async<16>(to(i), from[i] + first, (exists >> i & 1) && count > 0);
    } else {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) stage_elements(to(i), from[i] + first, exists >> i & 1 ? count : 0);
    }
  }
};

// The same where lines of memory are steps of depth: the same piece of several steps. Where an index picks them (kPicks: it
// may), it is read a stage ahead.
template <class T, class Stage, bool kPicks>
struct WidthOperand {
  static constexpr int kPieces = Stage::kLines / 8, kStep = Stage::kThreads / kPieces;
  const T* from;                 // without an index: this thread's first step of the next stage
  int64_t stride, depth, count;  // count: elements of the piece that exist
  const int32_t* index;
  int32_t last;
  int32_t picked[Stage::kEach];
  bool wide;

  // `from`: the first step of depth (with an index: line 0) at this thread's columns; `begin`: where the index starts.
  __device__ __forceinline__ WidthOperand(const Matrix& m, const T* from, int64_t begin, int64_t depth, int64_t count,
                                          int64_t across, int thread)
      : from(count > 0 ? from : static_cast<const T*>(m.data)),
        stride(m.line_stride),
        depth(depth),
        count(count),
        index(!kPicks || m.index == nullptr ? nullptr : m.index + begin),
        last(static_cast<int32_t>(clamped(m.lines - 1, 0, 0x7fffffff))),
        wide(wide_pieces(m, across)) {
    if (index == nullptr) this->from += thread / kPieces * stride;
    look_up(0, thread);
  }

  __device__ __forceinline__ void look_up(int64_t k, int thread) {
    if (index == nullptr) return;
#pragma unroll
    for (int i = 0; i < Stage::kEach; ++i) {
      const int64_t step = k + thread / kPieces + kStep * i;
      picked[i] = step < depth ? index[step] : 0;
    }
  }

  // Stages come one after the other.
  __device__ __forceinline__ void copy(char* stage, int64_t k, int thread) {
    const T* line[Stage::kEach];
    if (index == nullptr) {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i, from += kStep * stride) line[i] = from;
    } else {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) line[i] = from + min(max(picked[i], 0), last) * stride;
    }
    const int left = static_cast<int>(count > 0 ? clamped(depth - k, 0, Stage::kDepth) : 0) - thread / kPieces;
    const auto to = [&](int i) {
      return stage + Stage::template at<Layout::kWidth>(thread % kPieces * 8, thread / kPieces + kStep * i);
    };
    if (wide) {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) copy_async<16>(to(i), line[i], kStep * i < left);
    } else {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) stage_elements(to(i), line[i], kStep * i < left ? count : 0);
    }
    look_up(k + Stage::kDepth, thread);
  }
};

// Line `line` of a tile of B, of whose 64 lines the first half belongs to part 0 where there are two: its column of a part, and
// among the columns of all parts.
template <int kParts>
struct PartColumn {
  int64_t column, n;
  __device__ __forceinline__ PartColumn(const RowProduct& p, int64_t first, int line) {
    constexpr int kPart = 64 / kParts;
    const int within = line % 64;
    column = first + line / 64 * kPart + within % kPart;
    n = within / kPart * p.n + column;
  }
};

}  // namespace fastlm::cuda::gemm
