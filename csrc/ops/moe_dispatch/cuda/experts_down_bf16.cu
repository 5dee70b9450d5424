// experts_down.cuh for bfloat16.
#include "ops/moe_dispatch/cuda/experts_down.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t down_of<bfloat16>(const DownCall& call, cudaStream_t stream);
template cudaError_t outer_of<bfloat16>(const OuterCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
