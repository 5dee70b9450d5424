// Launches of the backward scan on CUDA. Torch-free. Nothing is launched for empty problems.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/selective_scan/cuda/backward_call.h"

namespace fastlm::selective_scan::cuda {

// Sets paired, split.part, split.slots and slices, from the shapes and from whether a block may have the shared memory of sm_90:
// the same call is cut in the same way on every device of an architecture.
void plan_backward(BackwardCall& call, DType dtype);

// Elements (of the accumulation type) of what `call` points to.
int64_t position_sums_size(const BackwardCall& call, DType dtype);
int64_t parameter_sums_size(const BackwardCall& call);
int64_t carried_size(const BackwardCall& call, DType dtype);

// `begin_states` of the split, where there is one, is memory that this fills.
cudaError_t launch_backward(BackwardCall call, const BackwardSums& sums, void* begin_states, DType dtype, cudaStream_t stream);

template <class T>
cudaError_t run_backward(const BackwardCall& call, cudaStream_t stream);

}  // namespace fastlm::selective_scan::cuda
