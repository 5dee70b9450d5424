// Launches of the CUDA kernels of causal_conv1d. Torch-free; `stream` is a cudaStream_t. Nothing is launched for empty problems.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {

cudaError_t launch_forward(const Params& params, DType dtype, cudaStream_t stream);

// Pieces of work whose partial weight gradients `BackwardParams::partial` must hold; a function of the problem alone, so that the
// sums have the same order on every device.
int64_t num_partials(const BackwardParams& params, DType dtype);
// dweight (D, W) in the dtype of the weight, dbias (D,) in that of the bias or null; both contiguous.
cudaError_t launch_backward(const BackwardParams& params, DType dtype, void* dweight, void* dbias, cudaStream_t stream);

cudaError_t launch_update(const UpdateParams& params, DType dtype, cudaStream_t stream);

// Parts of these, compiled apart so that they build in parallel: memory in which the positions of a channel are adjacent.
cudaError_t launch_forward_channels(const Params& params, DType dtype, cudaStream_t stream);
cudaError_t launch_backward_channels(const BackwardParams& params, DType dtype, cudaStream_t stream);

}  // namespace fastlm::causal_conv1d::cuda
