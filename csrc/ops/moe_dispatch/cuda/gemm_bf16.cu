// The grouped products of bfloat16.
#include "ops/moe_dispatch/cuda/gemm.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t run_row_product<bfloat16>(const fastlm::cuda::gemm::RowProduct&, fastlm::cuda::gemm::Layout, void*,
                                               cudaStream_t);
template cudaError_t run_outer_product<bfloat16>(const fastlm::cuda::gemm::OuterProduct&, void*, cudaStream_t);

}  // namespace fastlm::moe_dispatch::cuda
