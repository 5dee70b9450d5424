// selective_state_update on CUDA. The values of state_batch_indices stay on the device: a slot that does not exist is padding
// there.
#include "adapter/cuda.h"
#include "adapter/tensor.h"
#include "ops/selective_scan/call.h"
#include "ops/selective_scan/cuda/update.h"

namespace fastlm::selective_scan {
namespace {

Tensor update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
              OptionalTensor dt_bias, bool dt_softplus, OptionalTensor state_batch_indices) {
  constexpr const char* op = "selective_state_update";
  check_update(op, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices);
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = empty({x.size(0), x.size(1)}, x.scalar_type(), x);
  UpdateParams p{};
  fill_update(p, {state, x, dt, A, B, C, D, z, dt_bias, dt_softplus}, out);
  OptionalTensor slots;
  if (state_batch_indices.has_value()) {
    slots = torch::stable::contiguous(torch::stable::to(*state_batch_indices, ScalarType::Long));
    p.state_batch_indices = data<int64_t>(*slots);
  }
  const auto dtype = static_cast<DType>(kernel_index(x.scalar_type()));
  check_launch(op, cuda::launch_update(p, state.size(0), dtype, current_stream(x)));
  return out;
}

}  // namespace
}  // namespace fastlm::selective_scan

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("selective_state_update", TORCH_BOX(&fastlm::selective_scan::update));
}
