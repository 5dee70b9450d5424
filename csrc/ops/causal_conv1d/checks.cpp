// Argument checks of causal_conv1d.
#include "ops/causal_conv1d/checks.h"

namespace fastlm::causal_conv1d {
namespace {

bool check_activation(const char* op, const std::optional<std::string>& activation) {
  if (!activation.has_value()) return false;
  FASTLM_CHECK_VALUE(*activation == "silu" || *activation == "swish", op, ": activation must be None, 'silu' or 'swish', got '",
                     *activation, "'");
  return true;
}

void check_filter(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dim) {
  check_floating(op, "x", x);
  check_floating(op, "weight", weight);
  check_dim(op, "weight", weight, 2, "(D, W)");
  FASTLM_CHECK_VALUE(weight.size(0) == dim, op, ": weight must have shape (", dim, ", W), got ", shape_string(weight));
  FASTLM_CHECK_VALUE(weight.size(1) >= 1 && weight.size(1) <= kMaxWidth, op, ": weight must have a width between 1 and ",
                     kMaxWidth, ", got ", weight.size(1));
  check_same_device(op, "weight", weight, "x", x);
  if (bias.has_value()) {
    check_floating(op, "bias", *bias);
    check_shape(op, "bias", *bias, {dim});
    check_same_device(op, "bias", *bias, "x", x);
  }
}

}  // namespace

int64_t num_states(const Tensor& x, const OptionalTensor& cu_seqlens) {
  return cu_seqlens.has_value() ? max_of(cu_seqlens->size(0) - 1, 0) : x.size(0);
}

bool check_forward(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                   const std::optional<std::string>& activation, const OptionalTensor& cu_seqlens) {
  check_dim(op, "x", x, 3, "(B, D, L)");
  check_filter(op, x, weight, bias, x.size(1));
  if (seq_idx.has_value()) {
    FASTLM_CHECK_VALUE(!cu_seqlens.has_value(), op, ": seq_idx and cu_seqlens must not both be given");
    FASTLM_CHECK_VALUE(seq_idx->scalar_type() == ScalarType::Int || seq_idx->scalar_type() == ScalarType::Long, op,
                       ": seq_idx must have dtype int32 or int64, got ", dtype_name(seq_idx->scalar_type()));
    check_shape(op, "seq_idx", *seq_idx, {x.size(0), x.size(2)});
    check_same_device(op, "seq_idx", *seq_idx, "x", x);
  }
  if (cu_seqlens.has_value()) {
    check_cu_seqlens_shape(op, "cu_seqlens", *cu_seqlens, x.size(2));
    FASTLM_CHECK_VALUE(x.size(0) == 1, op, ": x must have batch 1 when cu_seqlens is given, got ", x.size(0));
    check_same_device(op, "cu_seqlens", *cu_seqlens, "x", x);
  }
  if (initial_states.has_value()) {
    check_shape(op, "initial_states", *initial_states, {num_states(x, cu_seqlens), x.size(1), weight.size(1) - 1});
    check_same_dtype(op, "initial_states", *initial_states, "x", x);
    check_same_device(op, "initial_states", *initial_states, "x", x);
  }
  return check_activation(op, activation);
}

void check_backward(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                    const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "causal_conv1d_backward";
  check_shape(op, "dout", dout, {x.size(0), x.size(1), x.size(2)});
  check_same_dtype(op, "dout", dout, "x", x);
  check_same_device(op, "dout", dout, "x", x);
  if (dfinal_states.has_value()) {
    check_shape(op, "dfinal_states", *dfinal_states, {num_states(x, cu_seqlens), x.size(1), weight.size(1) - 1});
    check_same_dtype(op, "dfinal_states", *dfinal_states, "x", x);
    check_same_device(op, "dfinal_states", *dfinal_states, "x", x);
  }
}

bool check_update(const char* op, const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                  const std::optional<std::string>& activation, const OptionalTensor& cache_seqlens,
                  const OptionalTensor& conv_state_indices) {
  FASTLM_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, op, ": x must have shape (B, D) or (B, D, m), got ", shape_string(x));
  check_filter(op, x, weight, bias, x.size(1));
  check_dim(op, "conv_state", conv_state, 3, "(B, D, S)");
  check_same_dtype(op, "conv_state", conv_state, "x", x);
  check_same_device(op, "conv_state", conv_state, "x", x);
  FASTLM_CHECK_VALUE(conv_state.size(1) == x.size(1), op, ": conv_state must have shape (B, ", x.size(1), ", S), got ",
                     shape_string(conv_state));
  FASTLM_CHECK_VALUE(conv_state.size(2) >= weight.size(1) - 1, op, ": conv_state must have a length S of at least ",
                     weight.size(1) - 1, " (W - 1), got ", conv_state.size(2));
  if (cache_seqlens.has_value()) {
    check_index_vector(op, "cache_seqlens", *cache_seqlens);
    check_shape(op, "cache_seqlens", *cache_seqlens, {x.size(0)});
    check_same_device(op, "cache_seqlens", *cache_seqlens, "x", x);
    FASTLM_CHECK_VALUE(conv_state.size(2) >= 1, op,
                       ": conv_state must have a length S of at least 1 when cache_seqlens is given, got ", conv_state.size(2));
  }
  if (conv_state_indices.has_value()) {
    check_index_vector(op, "conv_state_indices", *conv_state_indices);
    check_shape(op, "conv_state_indices", *conv_state_indices, {x.size(0)});
    check_same_device(op, "conv_state_indices", *conv_state_indices, "x", x);
  } else {
    FASTLM_CHECK_VALUE(conv_state.size(0) == x.size(0), op, ": conv_state must have shape (", x.size(0), ", ", x.size(1),
                       ", S), got ", shape_string(conv_state));
  }
  return check_activation(op, activation);
}

std::vector<Segment> make_segments(const char* op, const Tensor& x, int64_t width, const OptionalTensor& seq_idx,
                                   const OptionalTensor& cu_seqlens, bool has_initial) {
  std::vector<Segment> segments;
  const int64_t length = x.size(2);
  if (cu_seqlens.has_value()) {
    const std::vector<int64_t> bounds = check_cu_seqlens(op, "cu_seqlens", *cu_seqlens, length);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      segments.push_back({0, bounds[i], bounds[i + 1], has_initial ? row : -1, row, 0});
    }
    return segments;
  }
  for (int64_t b = 0; b < x.size(0); ++b) {
    if (!seq_idx.has_value() || length == 0) {
      segments.push_back({b, 0, length, has_initial ? b : -1, b, 0});
      continue;
    }
    const auto id = [&](int64_t t) -> int64_t {
      const int64_t offset = b * seq_idx->stride(0) + t * seq_idx->stride(1);
      return seq_idx->scalar_type() == ScalarType::Int ? data<int32_t>(*seq_idx)[offset] : data<int64_t>(*seq_idx)[offset];
    };
    int64_t begin = 0;
    for (int64_t t = 1; t <= length; ++t) {
      if (t < length && id(t) == id(begin)) continue;
      // Within the filter's reach an earlier document must not come back: the filter would have to skip over the one between.
      for (int64_t back = 1; t < length && back < width && begin - back >= 0; ++back) {
        if (t - (begin - back) >= width) break;
        FASTLM_CHECK_VALUE(id(begin - back) != id(t), op, ": seq_idx must not return to an earlier id within ", width - 1,
                           " positions, got id ", id(t), " again at row ", b, ", position ", t);
      }
      const bool first = begin == 0;
      segments.push_back({b, begin, t, first && has_initial ? b : -1, t == length ? b : -1, id(begin) < 0 ? 1 : 0});
      begin = t;
    }
  }
  return segments;
}

}  // namespace fastlm::causal_conv1d
