// Launches of the forward scan on CUDA. Torch-free. Nothing is launched for empty problems.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/selective_scan/cuda/forward_call.h"

namespace fastlm::selective_scan::cuda {

// Sets `part` and `slots`, from the shapes alone: the same call is cut in the same way on every device.
Split plan_split(const Params& params);

// `begin_states` of the split, where there is one, is memory that this fills.
cudaError_t launch_forward(ForwardCall call, void* begin_states, DType dtype, cudaStream_t stream);

template <class T>
cudaError_t run_forward(const ForwardCall& call, cudaStream_t stream);

}  // namespace fastlm::selective_scan::cuda
