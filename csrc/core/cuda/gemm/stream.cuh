// Row products with few rows a group, 16-bit elements, by mma.sync: bound by reading B once (the weights of experts while tokens
// are generated). Lines of B take the place of the sixteen rows of mma.sync, rows that of its eight columns, so that eight rows
// are enough for whole products.
//
// A block of four warps holds 64 lines of B (with two parts: 32 of each) and up to 32 rows; it runs through the whole depth, 64
// at a time, with five of its six stages under way: 40 KiB of B a block, two or three blocks on a multiprocessor. A tile is a
// block of its own; the device hands out what is left as blocks end.
#pragma once

#include "core/cuda/gemm/slab.cuh"
#include "core/cuda/gemm/stage.cuh"
#include "core/cuda/launch.h"

namespace fastlm::cuda::gemm {

struct StreamShape {
  static constexpr int kThreads = 128, kRows = 32, kLines = 64, kDepth = 64, kStages = 6, kBlocks = 2;
  using Lines = Stage<kLines, kDepth, kThreads>;
  using Rows = Stage<kRows, kDepth, kThreads>;
  static constexpr int kStageBytes = Lines::kBytes + Rows::kBytes, kSharedBytes = kStages * kStageBytes;
  static constexpr int kSumStride = kLines + 4;  // lanes that write sums meet different banks
  static_assert(kRows * kSumStride * 4 <= kSharedBytes);
};

// d[t] += 16 lines of a stage x rows 8 t .. 8 t + 7. `all`: rows 16 and up exist.
template <class T, Layout kB>
__device__ __forceinline__ void stream_stage(float (&d)[4][4], const char* stage, int line, bool all, int lane) {
  using S = StreamShape;
#pragma unroll
  for (int k = 0; k < S::kDepth; k += 16) {
    uint32_t lines[4], rows[4];
    S::Lines::fragment<kB, false>(lines, stage, line, k, lane);
    S::Rows::fragment<Layout::kDepth, true>(rows, stage + S::Lines::kBytes, 0, k, lane);
    mma_m16n8k16<T>(d[0], lines, rows[0], rows[1]);
    mma_m16n8k16<T>(d[1], lines, rows[2], rows[3]);
    if (all) {
      S::Rows::fragment<Layout::kDepth, true>(rows, stage + S::Lines::kBytes, 16, k, lane);
      mma_m16n8k16<T>(d[2], lines, rows[0], rows[1]);
      mma_m16n8k16<T>(d[3], lines, rows[2], rows[3]);
    }
  }
}

// Sums of one tile, handed to the epilogue as slabs of 16 rows x 64 lines by way of shared memory.
template <class T, Layout kB, class Lines, class Rows, class Epilogue>
__device__ __forceinline__ void stream_tile(const Tile& tile, int64_t n, int64_t depth, Lines b, Rows a,
                                            const Epilogue& epilogue) {
  using S = StreamShape;
  char* const ring = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const bool all = tile.row_end - tile.row > 16;
  float d[4][4] = {};
  const auto copy = [&](int64_t k, int stage) {
    if (k < depth) {
      b.copy(ring + stage * S::kStageBytes, k, thread);
      a.copy(ring + stage * S::kStageBytes + S::Lines::kBytes, k, thread);
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) copy(i * S::kDepth, i);
  int stage = 0;
#pragma unroll 1
  for (int64_t k = 0; k < depth; k += S::kDepth) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    copy(k + (S::kStages - 1) * S::kDepth, stage == 0 ? S::kStages - 1 : stage - 1);
    stream_stage<T, kB>(d, ring + stage * S::kStageBytes, 16 * warp, all, lane);
    stage = stage == S::kStages - 1 ? 0 : stage + 1;
  }
  __syncthreads();  // stages have been read
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[(8 * t + lane % 4 * 2 + i % 2) * S::kSumStride + 16 * warp + i / 2 * 8 + lane / 4] = d[t][i];
    }
  }
  __syncthreads();
  const Slab slab{tile.group, tile.row + 16 * warp, tile.row_end, tile.column, n, lane};
  if (warp >= S::kRows / 16 || slab.row >= slab.row_end) return;
  float out[32];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* const row = sums + (16 * warp + 8 * i + lane / 4) * S::kSumStride + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out[4 * j + 2 * i] = row[8 * j];
      out[4 * j + 2 * i + 1] = row[8 * j + 1];
    }
  }
  epilogue(slab, out);
}

template <class T, Layout kB, class Epilogue>
__global__ void __launch_bounds__(StreamShape::kThreads, StreamShape::kBlocks)
    stream_row_kernel(const __grid_constant__ RowProduct p, const __grid_constant__ Epilogue epilogue) {
  using S = StreamShape;
  constexpr int kParts = Epilogue::kParts;
  const int thread = static_cast<int>(threadIdx.x);
  Tile tile;
  if (!RowTiles<S::kRows, S::kLines / kParts>(p.rows, p.n, blockIdx.x, gridDim.x).next(tile)) return;
  const DepthOperand<T, S::Rows> a(p.a, p.k, thread, [&](int row) -> const T* {
    return tile.row + row < tile.row_end ? line_of<T>(p.a, 0, tile.row + row) : nullptr;
  });
  if constexpr (kB == Layout::kDepth) {
    const DepthOperand<T, S::Lines> b(p.b, p.k, thread, [&](int line) -> const T* {
      const PartColumn<kParts> at(p, tile.column, line);
      return at.column < p.n ? line_of<T>(p.b, tile.group, at.n) : nullptr;
    });
    stream_tile<T, kB>(tile, p.n, p.k, b, a, epilogue);
  } else {
    const PartColumn<kParts> at(p, tile.column, thread % 8 * 8);
    const T* const from = static_cast<const T*>(p.b.data) + tile.group * p.b.group_stride + at.n;
    const WidthOperand<T, S::Lines, false> b(p.b, from, 0, p.k, p.n - at.column, p.n, thread);
    stream_tile<T, kB>(tile, p.n, p.k, b, a, epilogue);
  }
}

template <class T, Layout kB, class Epilogue>
cudaError_t stream_row_product(const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t tiles = most_row_tiles(p.rows, p.n, StreamShape::kRows, StreamShape::kLines / Epilogue::kParts);
  if (tiles == 0) return cudaSuccess;
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch<stream_row_kernel<T, kB, Epilogue>>(dim3(static_cast<unsigned int>(tiles)), StreamShape::kThreads,
                                                    StreamShape::kSharedBytes, stream, p, epilogue);
}

}  // namespace fastlm::cuda::gemm
