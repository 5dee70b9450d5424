// Stages of 16-bit operands in shared memory: 128 lines (of what is not summed) x 32 of depth, as pieces of 16 bytes, read by
// ldmatrix. A stage keeps the order of its tensor; pieces are permuted so that the eight that a phase of ldmatrix reads or of
// cp.async writes lie in different banks.
//     kDepth   line l, depth 8 c ..   at piece 4 l + (c ^ l / 2 % 4)
//     kWidth   depth k, lines 8 c ..  at piece 16 k + (c ^ k % 8)
// Whatever is out of range is zero. Pieces that are aligned and whole are copied in the background, others element by element.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/gemm/problem.h"
#include "core/cuda/gemm/tiles.cuh"

namespace fastlm::cuda::gemm {

struct Stage {
  static constexpr int kLines = 128, kDepth = 32, kBytes = kLines * kDepth * 2, kThreads = 128;
  static constexpr int kEach = kBytes / 16 / kThreads;  // pieces of a thread

  template <Layout kLayout>
  static __device__ __forceinline__ int at(int line, int depth) {  // offset of the piece that holds this element
    return kLayout == Layout::kDepth ? line * 64 + ((depth / 8 ^ (line / 2 & 3)) << 4)
                                     : depth * 256 + ((line / 8 ^ (depth & 7)) << 4);
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

// What a thread copies of an operand whose depth is contiguous: piece thread % 4 of four lines.
template <class T>
struct DepthOperand {
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
      const T* const line = find(thread / 4 + 32 * i);
      exists |= (line != nullptr) << i;
      from[i] = line != nullptr ? line : static_cast<const T*>(m.data);
    }
  }

  __device__ __forceinline__ void copy(char* stage, int64_t k, int thread) {
    const int64_t first = k + thread % 4 * 8, count = depth - first;
    const auto to = [&](int i) { return stage + Stage::at<Layout::kDepth>(thread / 4 + 32 * i, thread % 4 * 8); };
    if (wide) {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) copy_async<16>(to(i), from[i] + first, (exists >> i & 1) && count > 0);
    } else {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) stage_elements(to(i), from[i] + first, exists >> i & 1 ? count : 0);
    }
  }
};

// The same where lines of memory are steps of depth: piece thread % 16 of four steps. Where an index picks them, it is read a
// stage ahead.
template <class T>
struct WidthOperand {
  const T* from;
  int64_t stride, depth, count;  // count: elements of the piece that exist
  const int32_t* index;
  int64_t last;
  int32_t picked[Stage::kEach];
  bool wide;

  // `from`: the first step of depth at this thread's columns; `begin`: its line.
  __device__ __forceinline__ WidthOperand(const Matrix& m, const T* from, int64_t begin, int64_t depth, int64_t count,
                                          int64_t across, int thread)
      : from(count > 0 ? from : static_cast<const T*>(m.data)),
        stride(m.line_stride),
        depth(depth),
        count(count),
        index(m.index == nullptr ? nullptr : m.index + begin),
        last(m.lines - 1),
        wide(wide_pieces(m, across)) {
    look_up(0, thread);
  }

  __device__ __forceinline__ void look_up(int64_t k, int thread) {
    if (index == nullptr) return;
#pragma unroll
    for (int i = 0; i < Stage::kEach; ++i) {
      const int64_t step = k + thread / 16 + 8 * i;
      picked[i] = step < depth ? index[step] : 0;
    }
  }

  __device__ __forceinline__ void copy(char* stage, int64_t k, int thread) {
    const int64_t first = k + thread / 16;
    const auto to = [&](int i) { return stage + Stage::at<Layout::kWidth>(thread % 16 * 8, thread / 16 + 8 * i); };
    const auto line = [&](int i) { return from + (index == nullptr ? first + 8 * i : clamped(picked[i], 0, last)) * stride; };
    const auto exists = [&](int i) { return first + 8 * i < depth && count > 0; };
    if (wide) {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) copy_async<16>(to(i), line(i), exists(i));
    } else {
#pragma unroll
      for (int i = 0; i < Stage::kEach; ++i) stage_elements(to(i), line(i), exists(i) ? count : 0);
    }
    look_up(k + Stage::kDepth, thread);
  }
};

}  // namespace fastlm::cuda::gemm
