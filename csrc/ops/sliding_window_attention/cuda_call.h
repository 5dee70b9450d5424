// How a forward call of sliding_window_attention on CUDA is set up; an operator that runs the attention beside something else
// takes it from here.
#pragma once

#include "ops/sliding_window_attention/call.h"

namespace fastlm::sliding_window_attention {

// Keeps contiguous copies alive as long as the launch needs them.
struct DeviceBounds {
  OptionalTensor cu_q, cu_k;
  void fill(DeviceSequences& d, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
            const OptionalTensor& cu_seqlens_k);
};

// Checks all arguments and takes the memory of a call.
class DeviceForward {
 public:
  DeviceForward(const char* op, const Inputs& inputs, const Options& options);
  DeviceForward(const DeviceForward&) = delete;
  DeviceForward& operator=(const DeviceForward&) = delete;

  bool empty() const { return out.numel() == 0; }

  Tensor out, lse;
  Params params{};

 private:
  Inputs in_;
  DeviceBounds bounds_;
};

}  // namespace fastlm::sliding_window_attention
