// moe_experts_backward on CUDA, all of it in the order of the experts' rows: the gradient of the activation with what follows
// from it, the gradients of the projections, those of the rows, the sum over a token's rows.
#include "ops/moe_dispatch/cuda_call.h"

namespace fastlm::moe_dispatch {
namespace {

void sum_rows(const char* op, const DevicePlan& plan, const gemm::Matrix& from, const void* weight, const Tensor& out,
              DType dtype, const Tensor& like) {
  const int64_t splits = cuda::sum_splits(out.size(0));
  const Tensor partial = empty({out.size(0), splits, out.size(1)}, accumulation_dtype(like.scalar_type()), like);
  const cuda::SumsCall call{plan.rows, from, out.size(1), weight, splits, partial.data_ptr(), out.data_ptr(), param_dtype(out)};
  check_launch(op, cuda::launch_sums(call, dtype, current_stream(like)));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_experts_backward(
    Tensor dout, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights,
    OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias, OptionalTensor grad_weights, Tensor gate_up,
    std::string activation, bool need_dhidden_states, bool need_dproj, bool need_dtopk_weights) {
  constexpr const char* op = "moe_experts_backward";
  check_experts(op, hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_proj_bias, down_proj_bias,
                grad_weights);
  check_experts_backward(dout, hidden_states, gate_up_proj, topk_ids, gate_up);
  const Activation kind = activation_of(op, activation);
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), top_k = topk_ids.size(1);
  const int64_t experts = down_proj.size(0), inner = down_proj.size(2), width = gate_up_proj.size(1);
  const bool gated = width == 2 * inner;
  const DeviceGuard guard(hidden_states.get_device_index());
  const cudaStream_t stream = current_stream(hidden_states);
  const ScalarType scalar = hidden_states.scalar_type(), acc = accumulation_dtype(scalar);
  const DType dtype = dtype_of(hidden_states);
  const auto fresh = [&](const std::vector<int64_t>& shape, ScalarType type) { return empty(shape, type, hidden_states); };
  const auto output = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType type) {
    return wanted ? fresh(shape, type) : no_tensor(type, hidden_states);
  };
  const auto bias_dtype = [&](const OptionalTensor& bias) { return bias.has_value() ? bias->scalar_type() : acc; };
  const Tensor dx = output(need_dhidden_states, {tokens, hidden}, scalar);
  const Tensor dgate_up_proj = output(need_dproj, {experts, width, hidden}, scalar);
  const Tensor ddown_proj = output(need_dproj, {experts, hidden, inner}, scalar);
  const Tensor dweights = output(need_dtopk_weights, {tokens, top_k}, topk_weights.scalar_type());
  const bool need_gate_up_bias = need_dproj && gate_up_proj_bias.has_value();
  const bool need_down_bias = need_dproj && down_proj_bias.has_value();
  const Tensor dgate_up_bias = output(need_gate_up_bias, {experts, width}, bias_dtype(gate_up_proj_bias));
  const Tensor ddown_bias = output(need_down_bias, {experts, hidden}, bias_dtype(down_proj_bias));
  const std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs{dx,       dgate_up_proj, ddown_proj,
                                                                           dweights, dgate_up_bias, ddown_bias};
  if (!need_dhidden_states && !need_dproj && !need_dtopk_weights) return outputs;

  const Tensor weights = in_acc(grad_weights.has_value() ? *grad_weights : topk_weights, hidden_states);
  const DevicePlan plan = device_plan(op, topk_ids, experts);
  const int64_t rows = plan.rows.rows;
  const Tensor weight = fresh({rows}, acc);  // of sorted rows
  check_launch(op, cuda::launch_weights({data<int32_t>(plan.perm), rows, weights.data_ptr(), weight.data_ptr()}, dtype, stream));
  const Tensor x = lines_of(hidden_states), dy = lines_of(dout);
  const DeviceWeight first = device_weight(gate_up_proj, 2), down_back = device_weight(down_proj, 1);
  const OptionalTensor first_bias = in_acc(gate_up_proj_bias, x);
  const bool recomputes = gate_up.dim() != 2;
  const bool need_inner_rows = need_dhidden_states || need_dproj;
  const Tensor kept = recomputes ? fresh({rows, width}, scalar) : torch::stable::contiguous(gate_up);
  OptionalTensor dgate_up;
  if (need_inner_rows) dgate_up = recomputes ? kept : OptionalTensor(fresh({rows, width}, scalar));
  OptionalTensor weighted_act;
  if (need_dproj) weighted_act = fresh({rows, inner}, scalar);
  const auto pointer_to = [](const OptionalTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; };

  // The products, with copies of rows where a backend cannot pick them.
  const gemm::Matrix inner_rows = copied_rows(rows, inner, pointer(weighted_act));
  const gemm::Matrix width_rows = copied_rows(rows, width, pointer(dgate_up));
  cuda::GateCall again{};
  again.of = {{plan.rows, inner, hidden, copied_rows(rows, hidden), first.matrix}, first.layout, {}};
  again.gated = gated;
  again.activation = kind;
  again.bias = pointer(first_bias);
  again.gate_up = kept.data_ptr();
  cuda::GateBackwardCall gate{};
  gate.of = {{plan.rows, inner, hidden, copied_rows(rows, hidden), down_back.matrix}, down_back.layout, {}};
  cuda::OuterCall of_down{{plan.rows, hidden, inner, copied_rows(rows, hidden), inner_rows}, {}, ddown_proj.data_ptr()};
  cuda::OuterCall of_gate{{plan.rows, width, hidden, width_rows, copied_rows(rows, hidden)}, {}, dgate_up_proj.data_ptr()};
  const auto choose = [&] {
    again.of.backend = gemm::row_backend(again.of.product, dtype, first.layout, gated ? 2 : 1);
    gate.of.backend = gemm::row_backend(gate.of.product, dtype, down_back.layout, 1);
    of_down.backend = gemm::outer_backend(of_down.product, dtype);
    of_gate.backend = gemm::outer_backend(of_gate.product, dtype);
  };
  choose();
  const auto copies = [](gemm::Backend backend) { return backend == gemm::Backend::kHopper; };
  const bool copy_dy = copies(gate.of.backend) || (need_dproj && copies(of_down.backend));
  const bool copy_x = (recomputes && copies(again.of.backend)) || (need_dproj && copies(of_gate.backend));
  // Gradients of rows go where their dy was: that is read no more by then.
  const OptionalTensor hidden_rows =
      copy_dy || need_dhidden_states ? OptionalTensor(fresh({rows, hidden}, scalar)) : OptionalTensor();
  OptionalTensor x_copy;
  if (copy_x) x_copy = fresh({rows, hidden}, scalar);
  gate.of.product.a = of_down.product.a = sorted_rows(op, dy, plan, copy_dy ? hidden_rows : OptionalTensor());
  again.of.product.a = of_gate.product.b = sorted_rows(op, x, plan, x_copy);
  choose();

  if (recomputes) check_launch(op, cuda::launch_gate(again, dtype, stream));
  const int64_t slabs = ceil_div(inner, gemm::slab_columns(gate.of.backend, 1));
  OptionalTensor shares;
  if (need_dtopk_weights) shares = fresh({slabs, rows}, acc);
  gate.gated = gated;
  gate.activation = kind;
  gate.gate_up = kept.data_ptr();
  gate.weight = weight.data_ptr();
  gate.dgate_up = pointer_to(dgate_up);
  gate.weighted_act = pointer_to(weighted_act);
  gate.shares = pointer_to(shares);
  check_launch(op, cuda::launch_gate_backward(gate, dtype, stream));
  if (need_dtopk_weights) {
    const OptionalTensor bias = in_acc(down_proj_bias, x);
    const cuda::PickGradientCall pick{
        plan.rows,           pointer(shares),      slabs, gate.of.product.a, hidden, pointer(bias), data<int32_t>(plan.perm),
        dweights.data_ptr(), param_dtype(dweights)};
    check_launch(op, cuda::launch_pick_gradient(pick, dtype, stream));
  }
  if (need_dproj) {
    check_launch(op, cuda::launch_outer(of_down, dtype, stream));
    check_launch(op, cuda::launch_outer(of_gate, dtype, stream));
  }
  if (need_down_bias) sum_rows(op, plan, gate.of.product.a, weight.data_ptr(), ddown_bias, dtype, x);
  if (need_gate_up_bias) sum_rows(op, plan, width_rows, nullptr, dgate_up_bias, dtype, x);
  if (need_dhidden_states) {
    const DeviceWeight first_back = device_weight(gate_up_proj, 1);
    cuda::DownCall back{};
    back.of = {{plan.rows, hidden, width, width_rows, first_back.matrix}, first_back.layout, {}};
    back.of.backend = gemm::row_backend(back.of.product, dtype, first_back.layout, 1);
    back.out = hidden_rows->data_ptr();
    check_launch(op, cuda::launch_down(back, dtype, stream));
    combine(op, *hidden_rows, plan, {}, top_k, dx);
  }
  return outputs;
}

}  // namespace fastlm::moe_dispatch
