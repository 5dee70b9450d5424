// Forward on sm_90a in two steps, for kernels that run its roles beside something else.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/sliding_window_attention/cuda/hopper_params.h"

namespace fastlm::sliding_window_attention::cuda {

// The argument of the kernel, for a call that hopper_forward_applies to.
HopperForward make_hopper_forward(const Params& p, DType dtype, cudaError_t& status);

// kD: 64, 128 or 256, at least the width of a head. Instances: hopper_forward_<kD>.cu.
template <int kD>
cudaError_t run_hopper_forward(const HopperForward& f, DType dtype, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
