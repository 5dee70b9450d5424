// Products of 16-bit elements by mma.sync, from sm_80 on; sums in float32.
//
// A block of four warps holds a tile of 128 x 128, a warp 64 x 64 of it: half the reads of shared memory of tiles of 32 x 64.
// With two parts, the columns of a warp are 32 of each. Steps of 32 along the depth go through a ring of four stages, three of
// them under way; two blocks share a multiprocessor, so that one multiplies while the other waits or stores.
#pragma once

#include "core/cuda/gemm/slab.cuh"
#include "core/cuda/gemm/stage.cuh"
#include "core/cuda/launch.h"

namespace fastlm::cuda::gemm {

struct MmaShape {
  static constexpr int kThreads = 128, kRows = 128, kColumns = 128, kWarp = 64, kStages = 4, kBlocks = 2;
  using Stage = gemm::Stage<128, 32, kThreads>;
  static constexpr int kStageBytes = 2 * Stage::kBytes, kSharedBytes = kStages * kStageBytes;
};

// d += one stage's 64 rows x 64 columns of a warp. Fragments are read one product of 16 x 16 ahead.
template <class T, Layout kA, Layout kB>
__device__ __forceinline__ void mma_stage(float (&d)[4][32], const char* stage, int row, int column, int lane) {
  using Stage = MmaShape::Stage;
  constexpr int kSteps = Stage::kDepth / 16;
  const char* const b_stage = stage + Stage::kBytes;
  uint32_t a[2][4][4], b[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) Stage::fragment<kA, false>(a[0][i], stage, row + 16 * i, 0, lane);
  Stage::fragment<kB, true>(b[0], b_stage, column, 0, lane);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int next = 4 * s + j + 1;
      if (next < 4 * kSteps) Stage::fragment<kB, true>(b[next % 2], b_stage, column + next % 4 * 16, next / 4 * 16, lane);
      if (s + 1 < kSteps) Stage::fragment<kA, false>(a[(s + 1) % 2][j], stage, row + 16 * j, (s + 1) * 16, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(d[i][8 * j + 4 * half]), a[s % 2][i], b[(next - 1) % 2][2 * half],
                          b[(next - 1) % 2][2 * half + 1]);
        }
      }
    }
  }
}

// Sums of one tile, handed to the epilogue.
template <class T, Layout kA, Layout kB, class OperandA, class OperandB, class Epilogue>
__device__ __forceinline__ void mma_tile(const Tile& tile, int64_t n, int64_t depth, OperandA a, OperandB b,
                                         const Epilogue& epilogue) {
  using S = MmaShape;
  using Stage = S::Stage;
  char* const ring = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = warp / 2 * S::kWarp, column = warp % 2 * S::kWarp;
  float d[4][32] = {};
  const auto copy = [&](int64_t k, int stage) {
    if (k < depth) {
      a.copy(ring + stage * S::kStageBytes, k, thread);
      b.copy(ring + stage * S::kStageBytes + Stage::kBytes, k, thread);
    }
    commit_copies();
  };
  __syncthreads();  // the stages of the last tile have been read
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) copy(i * Stage::kDepth, i);
  int stage = 0;
#pragma unroll 1
  for (int64_t k = 0; k < depth; k += Stage::kDepth) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    copy(k + (S::kStages - 1) * Stage::kDepth, (stage + S::kStages - 1) % S::kStages);
    mma_stage<T, kA, kB>(d, ring + stage * S::kStageBytes, row, column, lane);
    stage = (stage + 1) % S::kStages;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Slab slab{tile.group, tile.row + row + 16 * i, tile.row_end, tile.column + column / Epilogue::kParts, n, lane};
    if (slab.row < slab.row_end && slab.column < n) epilogue(slab, d[i]);
  }
}

template <class T, Layout kB, class Epilogue>
__global__ void __launch_bounds__(MmaShape::kThreads, MmaShape::kBlocks)
    mma_row_kernel(const __grid_constant__ RowProduct p, const __grid_constant__ Epilogue epilogue) {
  constexpr int kParts = Epilogue::kParts;
  const int thread = static_cast<int>(threadIdx.x);
  RowTiles<MmaShape::kRows, MmaShape::kColumns / kParts> tiles(p.rows, p.n, blockIdx.x, gridDim.x);
  Tile tile;
  while (tiles.next(tile)) {
    const DepthOperand<T, MmaShape::Stage> a(p.a, p.k, thread, [&](int line) -> const T* {
      return tile.row + line < tile.row_end ? line_of<T>(p.a, 0, tile.row + line) : nullptr;
    });
    if constexpr (kB == Layout::kDepth) {
      const DepthOperand<T, MmaShape::Stage> b(p.b, p.k, thread, [&](int line) -> const T* {
        const PartColumn<kParts> at(p, tile.column, line);
        return at.column < p.n ? line_of<T>(p.b, tile.group, at.n) : nullptr;
      });
      mma_tile<T, Layout::kDepth, kB>(tile, p.n, p.k, a, b, epilogue);
    } else {
      const PartColumn<kParts> at(p, tile.column, thread % 16 * 8);
      const T* const from = static_cast<const T*>(p.b.data) + tile.group * p.b.group_stride + at.n;
      const WidthOperand<T, MmaShape::Stage, false> b(p.b, from, 0, p.k, p.n - at.column, p.n, thread);
      mma_tile<T, Layout::kDepth, kB>(tile, p.n, p.k, a, b, epilogue);
    }
  }
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(MmaShape::kThreads, MmaShape::kBlocks)
    mma_outer_kernel(const __grid_constant__ OuterProduct p, const __grid_constant__ Epilogue epilogue) {
  static_assert(Epilogue::kParts == 1);
  const int thread = static_cast<int>(threadIdx.x), first = thread % 16 * 8;
  OuterTiles<MmaShape::kRows, MmaShape::kColumns> tiles(p.rows, p.m, p.n, blockIdx.x, gridDim.x);
  Tile tile;
  while (tiles.next(tile)) {
    const int64_t depth = tile.depth.end - tile.depth.begin;
    const auto operand = [&](const Matrix& m, int64_t column, int64_t columns) {
      const T* const from = static_cast<const T*>(m.data) + (m.index == nullptr ? tile.depth.begin * m.line_stride : 0) + column;
      return WidthOperand<T, MmaShape::Stage, true>(m, from, tile.depth.begin, depth, columns - column, columns, thread);
    };
    mma_tile<T, Layout::kWidth, Layout::kWidth>(tile, p.n, depth, operand(p.a, tile.row + first, p.m),
                                                operand(p.b, tile.column + first, p.n), epilogue);
  }
}

// As many blocks as run at once: each walks the groups once.
inline dim3 mma_grid(int64_t tiles) { return dim3(limited(tiles, MmaShape::kBlocks * current_device().num_sms)); }

template <class T, Layout kB, class Epilogue>
cudaError_t mma_row_product(const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t tiles = most_row_tiles(p.rows, p.n, MmaShape::kRows, MmaShape::kColumns / Epilogue::kParts);
  if (tiles == 0) return cudaSuccess;
  return launch<mma_row_kernel<T, kB, Epilogue>>(mma_grid(tiles), MmaShape::kThreads, MmaShape::kSharedBytes, stream, p,
                                                 epilogue);
}

template <class T, class Epilogue>
cudaError_t mma_outer_product(const OuterProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t each = ((p.m + MmaShape::kRows - 1) / MmaShape::kRows) * ((p.n + MmaShape::kColumns - 1) / MmaShape::kColumns);
  if (each * p.rows.groups == 0) return cudaSuccess;
  return launch<mma_outer_kernel<T, Epilogue>>(mma_grid(each * p.rows.groups), MmaShape::kThreads, MmaShape::kSharedBytes, stream,
                                               p, epilogue);
}

}  // namespace fastlm::cuda::gemm
