// How a forward call of selective_scan on CUDA is set up; an operator that runs the scan beside something else takes it from
// here.
#pragma once

#include "ops/selective_scan/call.h"
#include "ops/selective_scan/cuda/forward_call.h"

namespace fastlm::selective_scan {

// Contiguous copies of what kernels read as vectors of indices, and how they are typed.
struct DeviceIndices {
  OptionalTensor cu_seqlens;
  void fill(Params& p, const Tensor& u, const OptionalTensor& bounds);
};

// Checks all arguments and takes the memory of a call.
class DeviceForward {
 public:
  DeviceForward(const char* op, const Inputs& inputs, bool return_all_states);
  DeviceForward(const DeviceForward&) = delete;
  DeviceForward& operator=(const DeviceForward&) = delete;

  bool empty() const { return empty_; }
  // Splits time where that pays; needed before `call` unless the scan runs whole.
  void split();
  cuda::ForwardCall call{};
  void* begin_states() { return begin_states_.has_value() ? begin_states_->data_ptr() : nullptr; }

  Tensor out, last_state, chunk_states, all_states;

 private:
  Tensor u_;
  DeviceIndices indices_;
  bool empty_;
  OptionalTensor begin_states_, end_states_, decays_;
};

}  // namespace fastlm::selective_scan
