// experts_backward.cuh for bfloat16.
#include "ops/moe_dispatch/cuda/experts_backward.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t gate_backward_of<bfloat16>(const GateBackwardCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
