// selective_scan on CUDA, forward: checks -> parameters -> launch. Values of cu_seqlens are not checked, since that would stop
// the device; the kernels clamp them instead.
#include "adapter/cuda.h"

#include <numeric>

#include "adapter/tensor.h"
#include "ops/selective_scan/cuda/launch.h"
#include "ops/selective_scan/cuda_call.h"

namespace fastlm::selective_scan {

void DeviceIndices::fill(Params& p, const Tensor& u, const OptionalTensor& bounds) {
  p.num_sequences = num_states(u, bounds);
  if (!bounds.has_value()) return;
  cu_seqlens = torch::stable::contiguous(*bounds);
  p.device = {cu_seqlens->data_ptr(), cu_seqlens->scalar_type() == ScalarType::Long};
}

DeviceForward::DeviceForward(const char* op, const Inputs& in, bool return_all_states) : u_(in.u) {
  check_forward(op, in.u, in.delta, in.A, in.B, in.C, in.D, in.z, in.delta_bias, in.initial_state, in.cu_seqlens);
  const Tensor& u = in.u;
  const ScalarType acc = accumulation_type(u);
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = in.A.size(1);
  out = empty_like_layout(u, u.scalar_type());
  last_state = fastlm::empty({num_states(u, in.cu_seqlens), dim, state}, acc, u);
  chunk_states = fastlm::empty({batch, length / kChunk, state, dim}, acc, u);
  all_states = return_all_states ? fastlm::empty({batch, length, dim, state}, acc, u) : no_tensor(acc, u);

  ForwardParams& p = call.p;
  fill_params(p, in, chunk_states);
  indices_.fill(p, u, in.cu_seqlens);
  empty_ = p.dim == 0 || p.num_sequences == 0;
  p.out = activation(out);
  p.last_state = last_state.data_ptr();
  p.all_states = return_all_states ? all_states.data_ptr() : nullptr;
  const auto order = [](const Activation& x) { return cuda::order_of(x.dim_stride, x.seq_stride); };
  const auto matrix = [](const Projection& x) { return cuda::order_of(x.state_stride, x.seq_stride); };
  call.order = {order(p.u), order(p.delta), order(p.z), matrix(p.B), matrix(p.C), order(p.out)};
  call.split = {0, p.num_sequences, nullptr, nullptr, nullptr};
}

void DeviceForward::split() {
  call.split = cuda::plan_split(call.p);
  if (call.split.part == 0) return;
  const auto take = [&] { return fastlm::empty({call.split.slots, call.p.state, call.p.dim}, accumulation_type(u_), u_); };
  begin_states_ = take();
  end_states_ = take();
  decays_ = take();
  call.split.end_states = end_states_->data_ptr();
  call.split.decays = decays_->data_ptr();
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                   OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                                                   OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                   bool return_all_states) {
  constexpr const char* op = "selective_scan";
  const DeviceGuard guard(u.get_device_index());
  DeviceForward pass(op, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens}, return_all_states);
  if (!pass.empty()) {
    pass.split();
    const auto dtype = static_cast<DType>(kernel_index(u.scalar_type()));
    check_launch(op, cuda::launch_forward(pass.call, pass.begin_states(), dtype, current_stream(u)));
  }
  return {pass.out, pass.last_state, pass.chunk_states, pass.all_states};
}

}  // namespace
}  // namespace fastlm::selective_scan

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) { m.impl("selective_scan", TORCH_BOX(&fastlm::selective_scan::forward)); }
