// Launches of the CUDA kernels of causal_conv1d. Torch-free; `stream` is a cudaStream_t. Nothing is launched for empty problems.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {

cudaError_t launch_forward(const Params& params, DType dtype, bool channel_last, cudaStream_t stream);

// Pieces of work whose partial weight gradients `BackwardParams::partial` must hold.
int64_t num_partials(const Params& params, bool channel_last);
// dweight (D, W) and dbias (D,) in the accumulation type.
cudaError_t launch_backward(const BackwardParams& params, DType dtype, bool channel_last, int64_t num_states, void* dweight,
                            void* dbias, cudaStream_t stream);

cudaError_t launch_update(const UpdateParams& params, DType dtype, cudaStream_t stream);

}  // namespace fastlm::causal_conv1d::cuda
