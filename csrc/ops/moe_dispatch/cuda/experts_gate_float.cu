// experts_gate.cuh for float32 and float64.
#include "ops/moe_dispatch/cuda/experts_gate.cuh"

namespace fastlm::moe_dispatch::cuda {

template cudaError_t gate_of<float>(const GateCall& call, cudaStream_t stream);
template cudaError_t gate_of<double>(const GateCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
