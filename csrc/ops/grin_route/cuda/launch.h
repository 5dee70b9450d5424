// Launches of the CUDA kernels of grin_route. Torch-free; nothing is launched for empty problems.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/grin_route/params.h"

namespace fastlm::grin_route::cuda {

struct ForwardCall : ForwardParams {
  const int64_t* device_seed;  // stands for ForwardParams::seed, which the host does not know; null without a seed
};

cudaError_t launch_forward(const ForwardCall& call, DType dtype, cudaStream_t stream);

// Ids outside of [-1, E) count as -1.
cudaError_t launch_backward(const BackwardParams& params, DType dtype, cudaStream_t stream);

}  // namespace fastlm::grin_route::cuda
