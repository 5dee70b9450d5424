// Argument checks of moe_dispatch.
#include "ops/moe_dispatch/checks.h"

#include <limits>

namespace fastlm::moe_dispatch {
namespace {

void check_integers(const char* op, const char* name, const Tensor& t) {
  FASTLM_CHECK_VALUE(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", name,
                     " must have dtype int32 or int64, got ", dtype_name(t.scalar_type()));
}

// What a pick counts: float32 (float64 beside float64), or the dtype of the hidden states.
void check_pick_weights(const char* op, const char* name, const Tensor& t, const Tensor& hidden_states, const Tensor& topk_ids) {
  const ScalarType dtype = hidden_states.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  FASTLM_CHECK_VALUE(t.scalar_type() == acc || t.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype_name(acc),
                     dtype == acc ? std::string() : std::string(" or ") + dtype_name(dtype), ", got ",
                     dtype_name(t.scalar_type()));
  check_shape(op, name, t, {topk_ids.size(0), topk_ids.size(1)});
  check_same_device(op, name, t, "hidden_states", hidden_states);
}

void check_bias(const char* op, const char* name, const OptionalTensor& t, const Tensor& like, int64_t experts, int64_t rows) {
  if (!t.has_value()) return;
  check_floating(op, name, *t);
  check_shape(op, name, *t, {experts, rows});
  check_same_device(op, name, *t, "hidden_states", like);
}

}  // namespace

void check_ids(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  check_integers(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "(T, k)");
  FASTLM_CHECK_VALUE(topk_ids.size(1) >= 1 && topk_ids.size(1) <= 8, op, ": topk_ids must have 1 to 8 columns, got ",
                     topk_ids.size(1));
  FASTLM_CHECK_VALUE(num_experts >= 1, op, ": num_experts must be at least 1, got ", num_experts);
  FASTLM_CHECK_VALUE(topk_ids.numel() <= std::numeric_limits<int32_t>::max(), op,
                     ": topk_ids must have at most 2147483647 elements, got ", topk_ids.numel());
}

void check_grouped_gemm(const char* op, const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b) {
  check_floating(op, "a", a);
  check_dim(op, "a", a, 2, "(M, Kd)");
  check_dim(op, "b", b, 3, trans_b ? "(E, N, Kd)" : "(E, Kd, N)");
  check_same_dtype(op, "b", b, "a", a);
  check_same_device(op, "b", b, "a", a);
  FASTLM_CHECK_VALUE(b.size(trans_b ? 2 : 1) == a.size(1), op, ": b must have shape ",
                     trans_b ? join_text("(E, N, ", a.size(1), ")") : join_text("(E, ", a.size(1), ", N)"), ", got ",
                     shape_string(b));
  check_index_vector(op, "offsets", offsets);
  check_shape(op, "offsets", offsets, {b.size(0) + 1});
  check_same_device(op, "offsets", offsets, "a", a);
}

void check_grouped_gemm_backward(const Tensor& dout, const Tensor& a, const Tensor& b, bool trans_b) {
  constexpr const char* op = "grouped_gemm_backward";
  check_shape(op, "dout", dout, {a.size(0), b.size(trans_b ? 1 : 2)});
  check_same_dtype(op, "dout", dout, "a", a);
  check_same_device(op, "dout", dout, "a", a);
}

void check_experts(const char* op, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                   const Tensor& topk_ids, const Tensor& topk_weights, const OptionalTensor& gate_up_proj_bias,
                   const OptionalTensor& down_proj_bias, const OptionalTensor& grad_weights) {
  check_floating(op, "hidden_states", hidden_states);
  check_dim(op, "hidden_states", hidden_states, 2, "(T, h)");
  const int64_t hidden = hidden_states.size(1);
  check_dim(op, "down_proj", down_proj, 3, "(E, h, I)");
  const int64_t experts = down_proj.size(0);
  const int64_t inner = down_proj.size(2);
  check_shape(op, "down_proj", down_proj, {experts, hidden, inner});
  check_same_dtype(op, "down_proj", down_proj, "hidden_states", hidden_states);
  check_same_device(op, "down_proj", down_proj, "hidden_states", hidden_states);
  FASTLM_CHECK_VALUE(has_shape(gate_up_proj, {experts, 2 * inner, hidden}) || has_shape(gate_up_proj, {experts, inner, hidden}),
                     op, ": gate_up_proj must have shape ", shape_string({experts, 2 * inner, hidden}), " or, without a gate, ",
                     shape_string({experts, inner, hidden}), ", got ", shape_string(gate_up_proj));
  check_same_dtype(op, "gate_up_proj", gate_up_proj, "hidden_states", hidden_states);
  check_same_device(op, "gate_up_proj", gate_up_proj, "hidden_states", hidden_states);
  check_ids(op, topk_ids, experts);
  check_same_device(op, "topk_ids", topk_ids, "hidden_states", hidden_states);
  FASTLM_CHECK_VALUE(topk_ids.size(0) == hidden_states.size(0), op, ": topk_ids must have shape (", hidden_states.size(0),
                     ", k), got ", shape_string(topk_ids));
  check_pick_weights(op, "topk_weights", topk_weights, hidden_states, topk_ids);
  if (grad_weights.has_value()) check_pick_weights(op, "grad_weights", *grad_weights, hidden_states, topk_ids);
  check_bias(op, "gate_up_proj_bias", gate_up_proj_bias, hidden_states, experts, gate_up_proj.size(1));
  check_bias(op, "down_proj_bias", down_proj_bias, hidden_states, experts, hidden);
}

void check_experts_backward(const Tensor& dout, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& topk_ids,
                            const Tensor& gate_up) {
  constexpr const char* op = "moe_experts_backward";
  check_shape(op, "dout", dout, {hidden_states.size(0), hidden_states.size(1)});
  check_same_dtype(op, "dout", dout, "hidden_states", hidden_states);
  check_same_device(op, "dout", dout, "hidden_states", hidden_states);
  const std::vector<int64_t> kept{topk_ids.numel(), gate_up_proj.size(1)};
  FASTLM_CHECK_VALUE(has_shape(gate_up, {0}) || has_shape(gate_up, {kept[0], kept[1]}), op, ": gate_up must have shape ",
                     shape_string(kept), " or (0,), got ", shape_string(gate_up));
  check_same_dtype(op, "gate_up", gate_up, "hidden_states", hidden_states);
  check_same_device(op, "gate_up", gate_up, "hidden_states", hidden_states);
}

Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  FASTLM_CHECK_VALUE(name == "relu2", op, ": activation must be silu, gelu_tanh, relu or relu2, got ", name);
  return Activation::kRelu2;
}

std::vector<int32_t> id_values(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  const Tensor flat = torch::stable::contiguous(topk_ids);
  const int64_t n = flat.numel();
  std::vector<int32_t> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = flat.scalar_type() == ScalarType::Int ? data<int32_t>(flat)[i] : data<int64_t>(flat)[i];
    FASTLM_CHECK_INDEX(id >= -1 && id < num_experts, op, ": topk_ids must be in [-1, ", num_experts, "), got ", id, " at index ",
                       i);
    values[static_cast<size_t>(i)] = static_cast<int32_t>(id);
  }
  return values;
}

std::vector<int64_t> offset_values(const char* op, const Tensor& offsets, int64_t rows) {
  const std::vector<int64_t> values = index_values(offsets);
  FASTLM_CHECK_VALUE(values[0] == 0, op, ": offsets must start with 0, got ", values[0]);
  for (size_t i = 1; i < values.size(); ++i) {
    FASTLM_CHECK_VALUE(values[i] >= values[i - 1], op, ": offsets must not decrease, got ", values[i], " after ", values[i - 1],
                       " at index ", i);
  }
  FASTLM_CHECK_VALUE(values.back() <= rows, op, ": offsets must end at most at the number of rows, ", rows, ", got ",
                     values.back());
  return values;
}

}  // namespace fastlm::moe_dispatch
