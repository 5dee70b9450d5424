// Products by multiply-adds in the accumulation type: any element type, any strides and alignment. For float32 and float64, where
// users expect no rounding to tf32, and the yardstick of the other backends.
//
// A block of four warps holds a tile of 128 rows x 64 columns, a warp 64 x 32 of it, a thread 8 x 8. Steps of 16 along the summed
// dimension go through shared memory; the next one is read into registers meanwhile.
#pragma once

#include "core/cuda/gemm/slab.cuh"
#include "core/cuda/gemm/tiles.cuh"
#include "core/cuda/launch.h"

namespace fastlm::cuda::gemm {

struct FmaShape {
  static constexpr int kThreads = 128, kRows = 128, kColumns = 64, kDepth = 16;
  static constexpr int kRowStride = kRows + 1, kColumnStride = kColumns + 2;  // reads and writes meet different banks
  template <class A>
  static constexpr int kSharedBytes = kDepth * (kRowStride + 1 + kColumnStride) * static_cast<int>(sizeof(A));
};

// What one thread reads of an operand's step: kLines x 16 (kDepth: lines are what is not summed) or 16 x kLines.
template <class T, Layout kLayout, int kLines>
struct FmaOperand {
  using A = acc_t<T>;
  static constexpr int kEach = kLines * FmaShape::kDepth / FmaShape::kThreads;
  A value[kEach];

  static __device__ __forceinline__ int line(int thread, int i) {  // of the part that is not summed
    return kLayout == Layout::kDepth ? thread / FmaShape::kDepth + i * (FmaShape::kThreads / FmaShape::kDepth) : thread % kLines;
  }
  static __device__ __forceinline__ int depth(int thread, int i) {
    return kLayout == Layout::kDepth ? thread % FmaShape::kDepth : thread / kLines + i * (FmaShape::kThreads / kLines);
  }
  // `at(line, depth)`: address of an element, or null for one that counts as 0.
  template <class At>
  __device__ __forceinline__ void read(int thread, At&& at) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const T* p = at(line(thread, i), depth(thread, i));
      value[i] = p == nullptr ? A(0) : to_acc(*p);
    }
  }
  template <int kStride>
  __device__ __forceinline__ void write(int thread, A* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[depth(thread, i) * kStride + line(thread, i)] = value[i];
  }
};

// Sums of one tile, handed to the epilogue. `a_at` and `b_at` as above, by a depth that counts from 0 to `depth`.
template <class T, Layout kA, Layout kB, class Epilogue, class AtA, class AtB>
__device__ void fma_tile(const Tile& tile, int64_t n, int64_t depth, const AtA& a_at, const AtB& b_at, const Epilogue& epilogue) {
  using A = acc_t<T>;
  using S = FmaShape;
  A* const a = reinterpret_cast<A*>(shared_memory());
  A* const b = a + S::kDepth * (S::kRowStride + 1);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = warp / 2 * 64, column = warp % 2 * 32;
  A d[4][16] = {};
  FmaOperand<T, kA, S::kRows> next_a;
  FmaOperand<T, kB, S::kColumns> next_b;
  const auto read = [&](int64_t k) {
    next_a.read(thread, [&](int line, int i) { return k + i < depth ? a_at(line, k + i) : nullptr; });
    next_b.read(thread, [&](int line, int i) { return k + i < depth ? b_at(line, k + i) : nullptr; });
  };
  read(0);
#pragma unroll 1
  for (int64_t k = 0; k < depth; k += S::kDepth) {
    __syncthreads();
    next_a.template write<S::kRowStride>(thread, a);
    next_b.template write<S::kColumnStride>(thread, b);
    __syncthreads();
    if (k + S::kDepth < depth) read(k + S::kDepth);
#pragma unroll
    for (int i = 0; i < S::kDepth; ++i) {
      A x[8], y[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = a[i * S::kRowStride + row + 8 * j + lane / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        y[2 * j] = b[i * S::kColumnStride + column + 8 * j + lane % 4 * 2];
        y[2 * j + 1] = b[i * S::kColumnStride + column + 8 * j + lane % 4 * 2 + 1];
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          A& sum = d[r / 2][c / 2 * 4 + r % 2 * 2 + c % 2];
          sum = multiply_add(x[r], y[c], sum);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Slab slab{tile.group, tile.row + row + 16 * i, tile.row_end, tile.column + column / Epilogue::kParts, n, lane};
    if (slab.row < slab.row_end && slab.column < n) epilogue(slab, d[i]);
  }
}

template <class T, Layout kB, class Epilogue>
__global__ void __launch_bounds__(FmaShape::kThreads)
    fma_row_kernel(const __grid_constant__ RowProduct p, const __grid_constant__ Epilogue epilogue) {
  constexpr int kPartColumns = 32 / Epilogue::kParts;  // of a slab
  RowTiles<FmaShape::kRows, FmaShape::kColumns / Epilogue::kParts> tiles(p.rows, p.n, blockIdx.x, gridDim.x);
  Tile tile;
  while (tiles.next(tile)) {
    const auto a_at = [&](int line, int64_t k) -> const T* {
      return tile.row + line < tile.row_end ? line_of<T>(p.a, 0, tile.row + line) + k : nullptr;
    };
    const auto b_at = [&](int line, int64_t k) -> const T* {
      const int within = line % 32;
      const int64_t column = tile.column + line / 32 * kPartColumns + within % kPartColumns;
      if (column >= p.n) return nullptr;
      const int64_t n = within / kPartColumns * p.n + column;
      return kB == Layout::kDepth ? line_of<T>(p.b, tile.group, n) + k : line_of<T>(p.b, tile.group, k) + n;
    };
    fma_tile<T, Layout::kDepth, kB>(tile, p.n, p.k, a_at, b_at, epilogue);
  }
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(FmaShape::kThreads)
    fma_outer_kernel(const __grid_constant__ OuterProduct p, const __grid_constant__ Epilogue epilogue) {
  static_assert(Epilogue::kParts == 1);
  OuterTiles<FmaShape::kRows, FmaShape::kColumns> tiles(p.rows, p.m, p.n, blockIdx.x, gridDim.x);
  Tile tile;
  while (tiles.next(tile)) {
    const auto a_at = [&](int line, int64_t r) -> const T* {
      return tile.row + line < p.m ? line_of<T>(p.a, 0, tile.depth.begin + r) + tile.row + line : nullptr;
    };
    const auto b_at = [&](int line, int64_t r) -> const T* {
      return tile.column + line < p.n ? line_of<T>(p.b, 0, tile.depth.begin + r) + tile.column + line : nullptr;
    };
    fma_tile<T, Layout::kWidth, Layout::kWidth>(tile, p.n, tile.depth.end - tile.depth.begin, a_at, b_at, epilogue);
  }
}

template <class T, Layout kB, class Epilogue>
cudaError_t fma_row_product(const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t tiles = most_row_tiles(p.rows, p.n, FmaShape::kRows, FmaShape::kColumns / Epilogue::kParts);
  if (tiles == 0) return cudaSuccess;
  return launch<fma_row_kernel<T, kB, Epilogue>>(dim3(limited(tiles, 0x7fffffff)), FmaShape::kThreads,
                                                 FmaShape::kSharedBytes<acc_t<T>>, stream, p, epilogue);
}

template <class T, class Epilogue>
cudaError_t fma_outer_product(const OuterProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t each = ((p.m + FmaShape::kRows - 1) / FmaShape::kRows) * ((p.n + FmaShape::kColumns - 1) / FmaShape::kColumns);
  if (each * p.rows.groups == 0) return cudaSuccess;
  return launch<fma_outer_kernel<T, Epilogue>>(dim3(limited(each * p.rows.groups, 0x7fffffff)), FmaShape::kThreads,
                                               FmaShape::kSharedBytes<acc_t<T>>, stream, p, epilogue);
}

}  // namespace fastlm::cuda::gemm
