// Grouped products by element type, and the rows that belong to no group.
#include "ops/moe_dispatch/cuda/gemm.h"

#include "core/cuda/device.cuh"
#include "core/cuda/dispatch.h"
#include "core/cuda/gemm/tiles.cuh"
#include "core/cuda/launch.h"

namespace fastlm::moe_dispatch::cuda {
namespace {

using fastlm::cuda::gemm::clamped;
using fastlm::cuda::gemm::Layout;
using fastlm::cuda::gemm::OuterProduct;
using fastlm::cuda::gemm::Ragged;
using fastlm::cuda::gemm::RowProduct;

constexpr int kThreads = 256;

// Bytes begin to end of `data`, which is aligned to 16 bytes, by all threads of the grid.
__device__ __forceinline__ void fill_zeros(char* data, int64_t begin, int64_t end) {
  const uint32_t zero[4] = {0, 0, 0, 0};
  const int64_t first = begin / 16 + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t piece = first; piece * 16 < end; piece += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (piece * 16 >= begin && piece * 16 + 16 <= end) {
      fastlm::cuda::store_words<16>(data + piece * 16, zero);
      continue;
    }
    for (int i = 0; i < 16; ++i) {
      if (piece * 16 + i >= begin && piece * 16 + i < end) data[piece * 16 + i] = 0;
    }
  }
}

// Rows in front of the first group and behind the last one.
__global__ void __launch_bounds__(kThreads) zero_rows_kernel(const Ragged rows, char* out, int64_t row_bytes) {
  const int64_t begin = clamped(fastlm::cuda::load_index(rows.offsets, rows.wide, 0), 0, rows.rows);
  const int64_t end = clamped(fastlm::cuda::load_index(rows.offsets, rows.wide, rows.groups), begin, rows.rows);
  fill_zeros(out, 0, begin * row_bytes);
  fill_zeros(out, end * row_bytes, rows.rows * row_bytes);
}

}  // namespace

cudaError_t launch_row_product(const RowProduct& p, Layout b, void* out, DType dtype, cudaStream_t stream) {
  const int64_t row_bytes = p.n * (dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2);
  const int64_t pieces = (p.rows.rows * row_bytes + 16 * kThreads - 1) / (16 * kThreads);
  if (pieces == 0) return cudaSuccess;
  const unsigned int blocks = fastlm::cuda::limited(pieces, 4 * fastlm::cuda::current_device().num_sms);
  const cudaError_t status =
      fastlm::cuda::launch<zero_rows_kernel>(dim3(blocks), kThreads, 0, stream, p.rows, static_cast<char*>(out), row_bytes);
  if (status != cudaSuccess || p.rows.groups == 0) return status;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() { return run_row_product<T>(p, b, out, stream); });
}

cudaError_t launch_outer_product(const OuterProduct& p, void* out, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() { return run_outer_product<T>(p, out, stream); });
}

}  // namespace fastlm::moe_dispatch::cuda
