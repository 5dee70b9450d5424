// experts_down.cuh for float32 and float64.
#include "ops/moe_dispatch/cuda/experts_down.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t down_of<float>(const DownCall& call, cudaStream_t stream);
template cudaError_t outer_of<float>(const OuterCall& call, cudaStream_t stream);
template cudaError_t down_of<double>(const DownCall& call, cudaStream_t stream);
template cudaError_t outer_of<double>(const OuterCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
