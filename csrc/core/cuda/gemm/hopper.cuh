// Products on sm_90a: tiles of 128 rows x 256 columns (of two parts: 128 of each), whose operands tile copies (TMA) bring to a
// ring of four stages of 64 steps of depth, and wgmma multiplies from there. A block stays and takes one tile after another. Its
// first warpgroup is the producer: one thread walks over the tiles and copies, into the next tile while the sums of the last one
// are still being written. Two consumer warpgroups hold 64 rows x 256 columns of sums each.
//
// Two blocks of a cluster (kBlocks = 2) work on two tiles of rows of the same group and columns and copy one half of B each, to
// both: from the second-level cache come 32 KiB a step instead of 48. A stage is free once the consumers of both have left it.
// Where the second tile has no rows the block still takes part; so pairs are for groups of many rows.
//
// What lies outside of a tensor is copied as zeros. Other rows or columns that a tile does not own (of the next group, of the
// second part) only reach sums of their own, which nobody reads; but the depth of an outer product is rows, and where the last
// step holds rows of others, consumers put zeros in their place in both operands: what is there may be NaN.
#pragma once

#include "core/cuda/gemm/hopper_host.h"
#include "core/cuda/gemm/slab.cuh"
#include "core/cuda/gemm/tiles.cuh"
#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.h"

namespace fastlm::cuda::gemm {

struct HopperShape {
  static constexpr int kRows = kHopperRows, kColumns = 256, kDepth = kHopperDepth, kStages = 4;
  static constexpr int kThreads = 384, kConsumers = 256, kConsumerWarps = 8;
  static constexpr int kABytes = kRows * kDepth * 2, kBBytes = kColumns * kDepth * 2, kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8 + static_cast<int>(sizeof(Tile)));
};

// A stage holds 64 steps of A, then of B. By depth (K-major): rows of 64 steps, one for each row or column of the tile. By width
// (MN-major): panels of 64 rows or columns, whose rows are the steps.
struct HopperShared {
  using S = HopperShape;
  char* stages;
  Mbarrier *full, *empty;
  Tile* tiles;  // by stage: the tile whose first step lies there

  __device__ __forceinline__ explicit HopperShared(char* shared) {
    stages = shared;
    full = reinterpret_cast<Mbarrier*>(stages + S::kStages * S::kStageBytes);
    empty = full + S::kStages;
    tiles = reinterpret_cast<Tile*>(empty + S::kStages);
  }
  __device__ __forceinline__ char* a(int stage) const { return stages + stage * S::kStageBytes; }
  __device__ __forceinline__ char* b(int stage) const { return a(stage) + S::kABytes; }

  // By one thread; a barrier of the block or cluster must follow.
  template <int kBlocks>
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, S::kConsumerWarps * kBlocks);
    }
    mbarrier_fence_init();
  }
};

struct HopperRing {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++stage == HopperShape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct HopperOperands {
  TensorMap a, b;
  int32_t b_group;  // 1: B has a matrix for each group; 0: one for all
};

// Steps of a tile. One for a group without rows: it is filled with zeros.
__device__ __forceinline__ int steps_of(const Tile& tile) {
  const auto depth = static_cast<int>(tile.depth.end - tile.depth.begin);
  return depth > 0 ? (depth + HopperShape::kDepth - 1) / HopperShape::kDepth : 1;
}

// Lines `first` and later, kLines of one operand's step (rows or columns of the tile), in boxes of kBox; to all blocks of the
// cluster. `line_of(i)`: where line i lies in the tensor.
template <Layout kLayout, int kLines, int kBox, int kBlocks, class LineOf>
__device__ __forceinline__ void copy_operand(char* to, const TensorMap& map, Mbarrier* full, const LineOf& line_of, int first,
                                             int depth, int group) {
#pragma unroll
  for (int i = 0; i < kLines; i += kBox) {
    char* const box = to + (first + i) * HopperShape::kDepth * 2;
    const int line = line_of(first + i), c0 = kLayout == Layout::kDepth ? depth : line,
              c1 = kLayout == Layout::kDepth ? line : depth;
    if constexpr (kBlocks == 1) {
      load_tile(box, map, full, c0, c1, group, 0);
    } else {
      load_tile_to_blocks(box, map, full, (1u << kBlocks) - 1, c0, c1, group, 0);
    }
  }
}

// By one thread. `k`: depth of a row product.
template <Layout kA, Layout kB, int kParts, int kBlocks, class Tiles>
__device__ __forceinline__ void hopper_producer(Tiles& tiles, const HopperOperands& operands, const HopperShared& shared,
                                                int64_t n, int64_t k) {
  using S = HopperShape;
  constexpr int kHalf = S::kColumns / 2;
  constexpr int kBoxA = kA == Layout::kDepth ? S::kRows : 64, kBoxB = kB == Layout::kDepth ? kHalf : 64;
  const int rank = kBlocks == 1 ? 0 : cluster_rank();
  HopperRing ring;
  Tile tile;
  while (tiles.next(tile)) {
    tile.row += rank * S::kRows;
    if constexpr (kA == Layout::kDepth) tile.depth = {0, k};
    const auto row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
    const int second = kParts == 1 ? column + kHalf : static_cast<int>(n) + column;
    const int group = static_cast<int>(tile.group) * operands.b_group;
    const auto row_of = [&](int i) { return row + i; };
    const auto column_of = [&](int i) { return i < kHalf ? column + i : second + i - kHalf; };
    const int steps = steps_of(tile);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
      if (i == 0) shared.tiles[ring.stage] = tile;
      Mbarrier* const full = shared.full + ring.stage;
      mbarrier_arrive_expect(full, S::kStageBytes);
      const int depth = static_cast<int>(tile.depth.begin) + i * S::kDepth;
      copy_operand<kA, S::kRows, kBoxA, 1>(shared.a(ring.stage), operands.a, full, row_of, 0, depth, 0);
      copy_operand<kB, S::kColumns / kBlocks, kBoxB, kBlocks>(shared.b(ring.stage), operands.b, full, column_of, rank * kHalf,
                                                              depth, group);
      ring.step();
    }
  }
  mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
  shared.tiles[ring.stage].group = -1;
  mbarrier_arrive(shared.full + ring.stage);
  if constexpr (kBlocks > 1) {
    // The block must stay while the other one may still arrive here. What the other one copies here has come by then: consumers
    // have waited for it.
    for (int i = 1; i < S::kStages; ++i) {
      ring.step();
      mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
    }
  }
}

// Zeros instead of steps `from` and later of a stage, all of whose panels are MN-major; by all consumers.
__device__ __forceinline__ void drop_steps(char* stage, int from, int thread) {
  using S = HopperShape;
  constexpr int kPanels = (S::kRows + S::kColumns) / 64, kPieces = 8;
  for (int i = from * kPieces + thread; i < S::kDepth * kPieces; i += S::kConsumers) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      *reinterpret_cast<uint4*>(stage + panel * S::kDepth * 128 + i * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_async_shared();
  sync_named(1, S::kConsumers);
}

// By the 128 threads of consumer warpgroup 0 or 1.
template <class T, Layout kA, Layout kB, int kBlocks, class Epilogue>
__device__ __forceinline__ void hopper_consumer(const HopperShared& shared, int warpgroup, int thread, int64_t n,
                                                const Epilogue& epilogue) {
  using S = HopperShape;
  constexpr Major kMajorA = kA == Layout::kDepth ? Major::kK : Major::kMN;
  constexpr Major kMajorB = kB == Layout::kDepth ? Major::kK : Major::kMN;
  constexpr int kPanelBytes = S::kDepth * 128;  // 64 rows by depth, or 64 steps by width
  const int warp = __shfl_sync(kFullWarp, thread / 32, 0), lane = thread % 32;
  const uint64_t a_operand = swizzled_operand(shared.a(0) + warpgroup * kPanelBytes, kPanelBytes, 1024);
  const uint64_t b_operand = swizzled_operand(shared.b(0), kPanelBytes, 1024);
  const auto release = [&](int stage) {
    if constexpr (kBlocks == 1) {
      if (lane == 0) mbarrier_arrive(shared.empty + stage);
    } else {
      mbarrier_arrive_at(shared.empty + stage, lane % kBlocks, lane < kBlocks);
    }
  };
  HopperRing ring;
  while (true) {
    mbarrier_wait(shared.full + ring.stage, ring.parity);
    const Tile tile = shared.tiles[ring.stage];
    __syncwarp();  // before one of them gives the stage back
    if (tile.group < 0) break;
    const int steps = steps_of(tile);
    int before = 0;
    float d[S::kColumns / 2];
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      if (i > 0) mbarrier_wait(shared.full + ring.stage, ring.parity);
      if constexpr (kA == Layout::kWidth) {
        const auto left = static_cast<int>(tile.depth.end - tile.depth.begin) - i * S::kDepth;
        if (left < S::kDepth) drop_steps(shared.a(ring.stage), left, warpgroup * 128 + thread);
      }
      const uint64_t a = operand_at(a_operand, ring.stage * S::kStageBytes);
      const uint64_t b = operand_at(b_operand, ring.stage * S::kStageBytes);
      hold_registers(d);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < S::kDepth / 16; ++j) {
        wgmma<T, S::kColumns, kMajorA, kMajorB>(d, operand_at(a, j * (kMajorA == Major::kK ? 32 : 2048)),
                                                operand_at(b, j * (kMajorB == Major::kK ? 32 : 2048)), i > 0 || j > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release(before);
      before = ring.stage;
      ring.step();
    }
    wgmma_wait<0>();
    hold_registers(d);
    release(before);
    const Slab slab{tile.group, tile.row + warpgroup * 64 + warp * 16, tile.row_end, tile.column, n, lane};
    if (slab.row < slab.row_end) epilogue(slab, d);
  }
}

template <class T, Layout kA, Layout kB, int kBlocks, class Epilogue, class Tiles>
__device__ __forceinline__ void hopper_product(Tiles& tiles, const HopperOperands& operands, int64_t n, int64_t k,
                                               const Epilogue& epilogue) {
  const HopperShared shared(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warpgroup = __shfl_sync(kFullWarp, thread / 128, 0);
  if (thread == 0) {
    prefetch_map(operands.a);
    prefetch_map(operands.b);
    shared.open<kBlocks>();
  }
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  if (warpgroup == 0) {
    give_registers<40>();
    if (thread == 0) hopper_producer<kA, kB, Epilogue::kParts, kBlocks>(tiles, operands, shared, n, k);
    return;
  }
  take_registers<232>();
  hopper_consumer<T, kA, kB, kBlocks>(shared, warpgroup - 1, thread % 128, n, epilogue);
}

template <class T, Layout kB, int kBlocks, class Epilogue>
__global__ void __launch_bounds__(HopperShape::kThreads, 1)
    hopper_row_kernel(const __grid_constant__ RowProduct p, const __grid_constant__ HopperOperands operands,
                      const __grid_constant__ Epilogue epilogue) {
#if FASTLM_HOPPER_BODY
  RowTiles<kBlocks * HopperShape::kRows, HopperShape::kColumns / Epilogue::kParts> tiles(p.rows, p.n, blockIdx.x / kBlocks,
                                                                                         gridDim.x / kBlocks);
  hopper_product<T, Layout::kDepth, kB, kBlocks>(tiles, operands, p.n, p.k, epilogue);
#else
  __trap();
#endif
}

template <class T, int kBlocks, class Epilogue>
__global__ void __launch_bounds__(HopperShape::kThreads, 1)
    hopper_outer_kernel(const __grid_constant__ OuterProduct p, const __grid_constant__ HopperOperands operands,
                        const __grid_constant__ Epilogue epilogue) {
  static_assert(Epilogue::kParts == 1);
#if FASTLM_HOPPER_BODY
  OuterTiles<kBlocks * HopperShape::kRows, HopperShape::kColumns> tiles(p.rows, p.m, p.n, blockIdx.x / kBlocks,
                                                                        gridDim.x / kBlocks);
  hopper_product<T, Layout::kWidth, Layout::kWidth, kBlocks>(tiles, operands, p.n, 0, epilogue);
#else
  __trap();
#endif
}

// `tiles`: of one block or of a cluster.
template <int kBlocks, auto kKernel, class P, class Epilogue>
cudaError_t launch_hopper(int64_t tiles, const P& p, const HopperOperands& operands, const Epilogue& epilogue,
                          cudaStream_t stream) {
  using S = HopperShape;
  const int64_t clusters = current_device().num_sms / kBlocks;
  const dim3 grid(limited(tiles, clusters > 0 ? clusters : 1) * kBlocks);
  if constexpr (kBlocks == 1) {
    return launch<kKernel>(grid, S::kThreads, S::kSharedBytes, stream, p, operands, epilogue);
  } else {
    return launch_clusters<kKernel>(kBlocks, grid, S::kThreads, S::kSharedBytes, stream, p, operands, epilogue);
  }
}

template <class T, Layout kB, int kBlocks, class Epilogue>
cudaError_t run_hopper_row(const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  using S = HopperShape;
  const int64_t tiles = most_row_tiles(p.rows, p.n, kBlocks * S::kRows, S::kColumns / Epilogue::kParts);
  if (tiles == 0) return cudaSuccess;
  HopperOperands operands{{}, {}, p.b.group_stride != 0};
  cudaError_t status = make_tensor_map(operands.a, DTypeOf<T>::value, left_shape(p));
  if (status != cudaSuccess) return status;
  status = make_tensor_map(operands.b, DTypeOf<T>::value, right_shape(p, kB, Epilogue::kParts, S::kColumns / 2));
  if (status != cudaSuccess) return status;
  return launch_hopper<kBlocks, hopper_row_kernel<T, kB, kBlocks, Epilogue>>(tiles, p, operands, epilogue, stream);
}

template <class T, int kBlocks, class Epilogue>
cudaError_t run_hopper_outer(const OuterProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  using S = HopperShape;
  constexpr int kRows = kBlocks * S::kRows;
  const int64_t tiles = ((p.m + kRows - 1) / kRows) * ((p.n + S::kColumns - 1) / S::kColumns) * p.rows.groups;
  if (tiles == 0) return cudaSuccess;
  HopperOperands operands{{}, {}, 0};
  cudaError_t status = make_tensor_map(operands.a, DTypeOf<T>::value, outer_shape(p, p.a, p.m));
  if (status != cudaSuccess) return status;
  status = make_tensor_map(operands.b, DTypeOf<T>::value, outer_shape(p, p.b, p.n));
  if (status != cudaSuccess) return status;
  return launch_hopper<kBlocks, hopper_outer_kernel<T, kBlocks, Epilogue>>(tiles, p, operands, epilogue, stream);
}

// Only for products that hopper_applies said yes to. Pairs where a group has 1024 rows on average: what the last pair of a group
// lacks is then 6 % more on average than what a last tile lacks.
template <class T, Layout kB, class Epilogue>
cudaError_t hopper_row_product(const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const bool pairs = p.rows.rows >= 1024 * p.rows.groups;
  return pairs ? run_hopper_row<T, kB, 2>(p, epilogue, stream) : run_hopper_row<T, kB, 1>(p, epilogue, stream);
}

template <class T, class Epilogue>
cudaError_t hopper_outer_product(const OuterProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const bool pairs = p.m >= 1024 || (p.m + HopperShape::kRows - 1) / HopperShape::kRows % 2 == 0;
  return pairs ? run_hopper_outer<T, 2>(p, epilogue, stream) : run_hopper_outer<T, 1>(p, epilogue, stream);
}

}  // namespace fastlm::cuda::gemm
