// How a call of sliding_window_attention_update on CUDA is set up; an operator that decodes among other things launches it
// itself.
#pragma once

#include "adapter/cuda.h"
#include "ops/sliding_window_attention/call.h"
#include "ops/sliding_window_attention/cuda/update.h"

namespace fastlm::sliding_window_attention {

// Checks all arguments but the values of cache_seqlens, which the kernel clamps. Keeps the memory that the launch needs.
class DeviceUpdate {
 public:
  DeviceUpdate(const char* op, const UpdateInputs& inputs);
  DeviceUpdate(const DeviceUpdate&) = delete;
  DeviceUpdate& operator=(const DeviceUpdate&) = delete;

  bool empty() const { return in_.k.numel() == 0; }
  // Only where it is not empty. The counters must be set to zero before the launch that `params` and `workspace` describe.
  const UpdateParams& params() const { return p_; }
  const cuda::UpdateWorkspace& workspace() const { return w_; }
  int64_t num_counters() const { return num_counters_; }

  Tensor out;

 private:
  UpdateInputs in_;
  UpdateParams p_{};
  cuda::UpdateWorkspace w_{};
  int64_t num_counters_ = 0;
  OptionalTensor memory_;
};

}  // namespace fastlm::sliding_window_attention
