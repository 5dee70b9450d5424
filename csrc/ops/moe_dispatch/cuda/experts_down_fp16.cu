// experts_down.cuh for float16.
#include "ops/moe_dispatch/cuda/experts_down.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t down_of<float16>(const DownCall& call, cudaStream_t stream);
template cudaError_t outer_of<float16>(const OuterCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
