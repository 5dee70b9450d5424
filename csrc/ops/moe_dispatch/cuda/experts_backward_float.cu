// experts_backward.cuh for float32 and float64.
#include "ops/moe_dispatch/cuda/experts_backward.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t gate_backward_of<float>(const GateBackwardCall& call, cudaStream_t stream);
template cudaError_t gate_backward_of<double>(const GateBackwardCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
