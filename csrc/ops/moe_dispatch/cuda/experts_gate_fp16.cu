// experts_gate.cuh for float16.
#include "ops/moe_dispatch/cuda/experts_gate.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t gate_of<float16>(const GateCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
