// The decoding step of the scan on CUDA. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan::cuda {

// `num_slots`: rows of the state; rows of the batch whose slot is none of them are padding.
cudaError_t launch_update(const UpdateParams& params, int64_t num_slots, DType dtype, cudaStream_t stream);

}  // namespace fastlm::selective_scan::cuda
