// Argument checks shared by all operators.
#include "adapter/check.h"

namespace fastlm {

void check_floating(const char* op, const char* name, const Tensor& t) {
  FASTLM_CHECK_VALUE(is_floating(t.scalar_type()), op, ": ", name, " must have dtype float32, bfloat16, float16 or float64, got ",
                     dtype_name(t.scalar_type()));
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape_words) {
  FASTLM_CHECK_VALUE(t.dim() == dim, op, ": ", name, " must have shape ", shape_words, ", got ", shape_string(t));
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(static_cast<int64_t>(i)) == shape[i];
  FASTLM_CHECK_VALUE(same, op, ": ", name, " must have shape ", shape_string(shape), ", got ", shape_string(t));
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* main, const Tensor& like) {
  FASTLM_CHECK_VALUE(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", main, ", ",
                     dtype_name(like.scalar_type()), ", got ", dtype_name(t.scalar_type()));
}

void check_same_device(const char* op, const char* name, const Tensor& t, const char* main, const Tensor& like) {
  FASTLM_CHECK_VALUE(
      t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ",
      name, " must be on the device of ", main, ", ", like.is_cuda() ? "cuda" : "cpu", ", got ",
      t.is_cuda() ? "cuda" : (t.is_cpu() ? "cpu" : "another device"));
}

void check_index_vector(const char* op, const char* name, const Tensor& t) {
  FASTLM_CHECK_VALUE(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", name,
                     " must have dtype int32 or int64, got ", dtype_name(t.scalar_type()));
  FASTLM_CHECK_VALUE(t.dim() == 1, op, ": ", name, " must have one dimension, got ", shape_string(t));
}

std::vector<int64_t> index_values(const Tensor& t) {
  const int64_t n = t.size(0);
  const int64_t stride = t.stride(0);
  std::vector<int64_t> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    values[static_cast<size_t>(i)] =
        t.scalar_type() == ScalarType::Int ? data<int32_t>(t)[i * stride] : data<int64_t>(t)[i * stride];
  }
  return values;
}

void check_cu_seqlens_shape(const char* op, const char* name, const Tensor& t, int64_t total) {
  check_index_vector(op, name, t);
  FASTLM_CHECK_VALUE(t.size(0) >= 1, op, ": ", name, " must have at least 1 element (0), got shape ", shape_string(t));
  FASTLM_CHECK_VALUE(t.size(0) >= 2 || total == 0, op, ": ", name, " must have at least 2 elements (0 and ", total,
                     "), got shape ", shape_string(t));
}

std::vector<int64_t> check_cu_seqlens(const char* op, const char* name, const Tensor& t, int64_t total) {
  check_cu_seqlens_shape(op, name, t, total);
  std::vector<int64_t> values = index_values(t);
  FASTLM_CHECK_VALUE(values.front() == 0, op, ": ", name, " must start with 0, got ", values.front());
  for (size_t i = 1; i < values.size(); ++i) {
    FASTLM_CHECK_VALUE(values[i] >= values[i - 1], op, ": ", name, " must never decrease, got ", values[i - 1], " then ",
                       values[i], " at index ", i);
  }
  FASTLM_CHECK_VALUE(values.back() == total, op, ": ", name, " must end with ", total, ", got ", values.back());
  return values;
}

}  // namespace fastlm
