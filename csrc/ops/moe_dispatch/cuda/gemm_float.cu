// The grouped products of float32.
#include "ops/moe_dispatch/cuda/gemm.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t run_row_product<float>(const fastlm::cuda::gemm::RowProduct&, fastlm::cuda::gemm::Layout, void*,
                                            cudaStream_t);
template cudaError_t run_outer_product<float>(const fastlm::cuda::gemm::OuterProduct&, void*, cudaStream_t);

}  // namespace fastlm::moe_dispatch::cuda
