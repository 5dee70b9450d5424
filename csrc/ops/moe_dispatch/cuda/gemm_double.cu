// The grouped products of float64.
#include "ops/moe_dispatch/cuda/gemm.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t run_row_product<double>(const fastlm::cuda::gemm::RowProduct&, fastlm::cuda::gemm::Layout, void*,
                                             cudaStream_t);
template cudaError_t run_outer_product<double>(const fastlm::cuda::gemm::OuterProduct&, void*, cudaStream_t);

}  // namespace fastlm::moe_dispatch::cuda
