// What the CUDA twins need from torch: the device of a tensor made current, its stream, and launch results as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#ifndef FASTLM_EMULATE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include "adapter/tensor.h"

// The key the twins are registered under: CPU where the device is emulated (tests only).
#ifdef FASTLM_EMULATE_CUDA
#define FASTLM_CUDA_KEY CPU
#else
#define FASTLM_CUDA_KEY CUDA
#endif

namespace fastlm {

#ifdef FASTLM_EMULATE_CUDA
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
#endif

// torch's current stream on the device of `t`.
cudaStream_t current_stream(const Tensor& t);

// std::runtime_error with the operator's name and CUDA's text unless `status` is success.
void check_launch(const char* op, cudaError_t status);

}  // namespace fastlm
