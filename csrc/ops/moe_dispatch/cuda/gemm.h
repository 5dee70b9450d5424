// Launches of grouped products on CUDA. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include "core/cuda/gemm/problem.h"

namespace fastlm::moe_dispatch::cuda {

// out (rows, n), contiguous: the sums, and 0 in rows of no group. `b`: the layout of B. Offsets are given.
cudaError_t launch_row_product(const fastlm::cuda::gemm::RowProduct& p, fastlm::cuda::gemm::Layout b, void* out, DType dtype,
                               cudaStream_t stream);

// out (groups, m, n), contiguous.
cudaError_t launch_outer_product(const fastlm::cuda::gemm::OuterProduct& p, void* out, DType dtype, cudaStream_t stream);

template <class T>
cudaError_t run_row_product(const fastlm::cuda::gemm::RowProduct& p, fastlm::cuda::gemm::Layout b, void* out,
                            cudaStream_t stream);
template <class T>
cudaError_t run_outer_product(const fastlm::cuda::gemm::OuterProduct& p, void* out, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
