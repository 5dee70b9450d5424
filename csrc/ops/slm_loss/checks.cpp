// Argument checks of slm_loss.
#include "ops/slm_loss/checks.h"

namespace fastlm::slm_loss {
namespace {

void check_per_token(const char* op, const char* name, const OptionalTensor& t, const Tensor& hidden, const Tensor& labels) {
  if (!t.has_value()) return;
  const auto sizes = labels.sizes();
  check_shape(op, name, *t, {sizes.begin(), sizes.end()});
  FASTLM_CHECK_VALUE(t->scalar_type() == loss_dtype(hidden), op, ": ", name, " must have dtype ", dtype_name(loss_dtype(hidden)),
                     ", got ", dtype_name(t->scalar_type()));
  check_same_device(op, name, *t, "hidden", hidden);
}

}  // namespace

ScalarType loss_dtype(const Tensor& hidden) {
  return hidden.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_head(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& labels, const OptionalTensor& bias,
                double softcap) {
  check_floating(op, "hidden", hidden);
  FASTLM_CHECK_VALUE(hidden.dim() >= 1, op, ": hidden must have shape (..., h), got ", shape_string(hidden));
  check_dim(op, "weight", weight, 2, "(V, h)");
  const int64_t hidden_size = hidden.size(hidden.dim() - 1);
  FASTLM_CHECK_VALUE(weight.size(1) == hidden_size, op, ": weight must have shape (V, ", hidden_size, "), got ",
                     shape_string(weight));
  check_same_dtype(op, "weight", weight, "hidden", hidden);
  check_same_device(op, "weight", weight, "hidden", hidden);
  FASTLM_CHECK_VALUE(labels.scalar_type() == ScalarType::Int || labels.scalar_type() == ScalarType::Long, op,
                     ": labels must have dtype int32 or int64, got ", dtype_name(labels.scalar_type()));
  const auto sizes = hidden.sizes();
  check_shape(op, "labels", labels, {sizes.begin(), sizes.end() - 1});
  check_same_device(op, "labels", labels, "hidden", hidden);
  if (bias.has_value()) {
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {weight.size(0)});
    check_same_device(op, "bias", *bias, "hidden", hidden);
  }
  FASTLM_CHECK_VALUE(softcap >= 0, op, ": softcap must not be negative, got ", softcap);
}

void check_backward(const OptionalTensor& dnll, const OptionalTensor& dlse, const OptionalTensor& dentropy, const Tensor& hidden,
                    const Tensor& labels, const Tensor& lse, const Tensor& entropy) {
  constexpr const char* op = "linear_nll_backward";
  check_per_token(op, "dnll", dnll, hidden, labels);
  check_per_token(op, "dlse", dlse, hidden, labels);
  check_per_token(op, "dentropy", dentropy, hidden, labels);
  check_per_token(op, "lse", lse, hidden, labels);
  if (dentropy.has_value()) check_per_token(op, "entropy", entropy, hidden, labels);
}

bool check_select(const char* op, const Tensor& score, const Tensor& eligible, const OptionalTensor& cu_seqlens,
                  double keep_ratio, const std::string& tie_break) {
  check_floating(op, "score", score);
  const auto sizes = score.sizes();
  check_shape(op, "eligible", eligible, {sizes.begin(), sizes.end()});
  FASTLM_CHECK_VALUE(eligible.scalar_type() == ScalarType::Bool, op, ": eligible must have dtype bool, got ",
                     dtype_name(eligible.scalar_type()));
  check_same_device(op, "eligible", eligible, "score", score);
  if (cu_seqlens.has_value()) {
    check_cu_seqlens_shape(op, "cu_seqlens", *cu_seqlens, score.size(0));
    check_same_device(op, "cu_seqlens", *cu_seqlens, "score", score);
  }
  FASTLM_CHECK_VALUE(keep_ratio >= 0 && keep_ratio <= 1, op, ": keep_ratio must be in [0, 1], got ", keep_ratio);
  FASTLM_CHECK_VALUE(tie_break == "index" || tie_break == "random", op, ": tie_break must be 'index' or 'random', got '",
                     tie_break, "'");
  return tie_break == "random";
}

std::vector<int64_t> label_values(const char* op, const Tensor& labels, int64_t vocab, int64_t ignore_index) {
  const Tensor flat = torch::stable::contiguous(labels);
  const int64_t n = flat.numel();
  std::vector<int64_t> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = flat.scalar_type() == ScalarType::Int ? data<int32_t>(flat)[i] : data<int64_t>(flat)[i];
    FASTLM_CHECK_INDEX(label == ignore_index || (label >= 0 && label < vocab), op, ": labels must be in [0, ", vocab, ") or ",
                       ignore_index, ", got ", label, " at index ", i);
    values[static_cast<size_t>(i)] = label;
  }
  return values;
}

}  // namespace fastlm::slm_loss
