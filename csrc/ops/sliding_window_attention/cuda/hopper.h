// The sm_90a kernels of sliding_window_attention: which calls they take, and how they are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

// bf16 or fp16 with rows that tile copies can address (16-byte aligned, heads a multiple of 8 and at most 256 wide).
bool hopper_forward_applies(const Params& p, DType dtype);
cudaError_t launch_hopper_forward(const Params& p, DType dtype, cudaStream_t stream);

// The same, with heads at most 128 wide. row_delta must be filled; the workspace is 256-byte aligned and may hold anything.
bool hopper_backward_applies(const BackwardParams& p, DType dtype);
size_t hopper_backward_workspace_bytes(const BackwardParams& p);
cudaError_t launch_hopper_backward(const BackwardParams& p, void* workspace, DType dtype, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
