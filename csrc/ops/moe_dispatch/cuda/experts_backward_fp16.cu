// experts_backward.cuh for float16.
#include "ops/moe_dispatch/cuda/experts_backward.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t gate_backward_of<float16>(const GateBackwardCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
