// Matrix products with ragged groups of rows, as operators describe them to a backend. Two kinds:
//
//   RowProduct   out[r, n] = sum over k of A[r, k] B[g, n, k]      r in the rows of group g
//   OuterProduct out[g, m, n] = sum over r of A[r, m] B[r, n]      r in the rows of group g; a group without rows gives zeros
//
// What becomes of the sums is up to an epilogue (slab.cuh). Group sizes lie on the device and are never read by the host: grids
// and workspaces are for the most there can be, and what is not there costs a look at the offsets.
//
// Backends: kHopper (sm_90a: wgmma, tile copies), kMma (16-bit elements: mma.sync), kStream (the same for few rows
// a group: row products bound by reading B), kFma (any element type: multiply-adds in the accumulation type, no tf32). A sum over
// k runs in order of k in each of them, whatever the other rows are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::cuda::gemm {

// Runs of rows, one for each group. Offsets are clamped on the device: to [0, rows], and an end to no less than its begin.
struct Ragged {
  const void* offsets;  // (groups + 1,) int32, or int64 if `wide`; null: one group
  bool wide;
  int64_t groups;
  int64_t rows;          // the most there can be
  const int32_t* count;  // without offsets: the group has rows [0, *count - first) of [0, rows); null: all of them
  int64_t first;
};

// How an operand lies in memory: kDepth: the summed dimension is contiguous; kWidth: the other one is.
enum class Layout { kDepth, kWidth };

// Lines of contiguous elements. `index`: line r of the product is line index[r] here, clamped to [0, lines); null: line r.
struct Matrix {
  const void* data;
  int64_t line_stride;   // elements
  int64_t group_stride;  // elements from one group's matrix to the next; 0: all have the same
  const int32_t* index;
  int64_t lines;
};

// A: lines are rows (kDepth). B: lines are columns n (kDepth) or steps of k (kWidth).
struct RowProduct {
  Ragged rows;
  int64_t n, k;  // n: columns of one part; an epilogue of two parts has 2 n columns of B, the second part behind the first
  Matrix a, b;
};

// A and B: lines are rows r (kWidth).
struct OuterProduct {
  Ragged rows;
  int64_t m, n;
  Matrix a, b;
};

enum class Backend { kHopper, kMma, kStream, kFma };

// Columns (of one part) that a slab of a backend holds: what epilogues that reduce along rows size their workspaces by.
constexpr int64_t slab_columns(Backend backend, int parts) {
  return (backend == Backend::kHopper ? 256 : backend == Backend::kFma ? 32 : 64) / parts;
}

}  // namespace fastlm::cuda::gemm
