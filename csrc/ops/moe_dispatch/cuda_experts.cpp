// moe_experts on CUDA: plan, the gated product, the product behind it, the weighted sum. Nothing is read from the device, so
// buffers hold a row for every pick. Ids are not checked, since that would stop the device: one that is no expert counts as -1.
#include "ops/moe_dispatch/cuda_call.h"

namespace fastlm::moe_dispatch {
namespace {

std::tuple<Tensor, Tensor> cuda_experts_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids,
                                                Tensor topk_weights, OptionalTensor gate_up_proj_bias,
                                                OptionalTensor down_proj_bias, OptionalTensor grad_weights,
                                                std::string activation, bool keep_gate_up) {
  constexpr const char* op = "moe_experts";
  check_experts(op, hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_proj_bias, down_proj_bias,
                grad_weights);
  const Activation kind = activation_of(op, activation);
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), top_k = topk_ids.size(1);
  const int64_t experts = down_proj.size(0), inner = down_proj.size(2), width = gate_up_proj.size(1);
  const bool gated = width == 2 * inner;
  const DeviceGuard guard(hidden_states.get_device_index());
  const cudaStream_t stream = current_stream(hidden_states);
  const ScalarType scalar = hidden_states.scalar_type();
  const DType dtype = dtype_of(hidden_states);
  const Tensor out = empty({tokens, hidden}, scalar, hidden_states);
  const Tensor kept = keep_gate_up ? empty({tokens * top_k, width}, scalar, hidden_states) : no_tensor(scalar, hidden_states);
  if (tokens == 0) return {out, kept};

  const DevicePlan plan = device_plan(op, topk_ids, experts);
  const int64_t rows = plan.rows.rows;
  const Tensor x = lines_of(hidden_states);
  const DeviceWeight first = device_weight(gate_up_proj, 2), second = device_weight(down_proj, 2);
  const OptionalTensor first_bias = in_acc(gate_up_proj_bias, x), second_bias = in_acc(down_proj_bias, x);
  const Tensor act = empty({rows, inner}, scalar, x);
  const Tensor expert_rows = empty({rows, hidden}, scalar, x);  // what the experts read, if it is copied; then what they say

  cuda::GateCall gate{};
  gate.of = {{plan.rows, inner, hidden, copied_rows(rows, hidden, expert_rows.data_ptr()), first.matrix}, first.layout, {}};
  gate.of.backend = gemm::row_backend(gate.of.product, dtype, first.layout, gated ? 2 : 1);
  const bool copies = gate.of.backend == gemm::Backend::kHopper;
  gate.of.product.a = sorted_rows(op, x, plan, copies ? OptionalTensor(expert_rows) : OptionalTensor());
  gate.of.backend = gemm::row_backend(gate.of.product, dtype, first.layout, gated ? 2 : 1);
  gate.gated = gated;
  gate.activation = kind;
  gate.bias = pointer(first_bias);
  gate.act = act.data_ptr();
  gate.gate_up = keep_gate_up ? kept.data_ptr() : nullptr;
  check_launch(op, cuda::launch_gate(gate, dtype, stream));
  if (keep_gate_up) check_launch(op, cuda::launch_clear({plan.rows, kept.data_ptr(), width}, dtype, stream));

  cuda::DownCall down{};
  down.of = {{plan.rows, hidden, inner, copied_rows(rows, inner, act.data_ptr()), second.matrix}, second.layout, {}};
  down.of.backend = gemm::row_backend(down.of.product, dtype, second.layout, 1);
  down.bias = pointer(second_bias);
  down.out = expert_rows.data_ptr();
  check_launch(op, cuda::launch_down(down, dtype, stream));
  combine(op, expert_rows, plan, in_acc(topk_weights, x), top_k, out);
  return {out, kept};
}

}  // namespace
}  // namespace fastlm::moe_dispatch

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("moe_experts", TORCH_BOX(&fastlm::moe_dispatch::cuda_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&fastlm::moe_dispatch::cuda_experts_backward));
}
