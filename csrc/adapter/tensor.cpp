// Tensor helpers of the adapters.
#include "adapter/tensor.h"

#include <algorithm>
#include <array>

namespace fastlm {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another dtype";
  }
}

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  if (shape.size() == 1) text += ",";
  return text + ")";
}

std::string shape_string(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_string(std::vector<int64_t>(sizes.begin(), sizes.end()));
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t expected : shape) {
    if (t.size(i++) != expected) return false;
  }
  return true;
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Double;
}

ScalarType accumulation_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

DType param_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor zeros(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_zeros(like, shape, dtype);
}

Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype,
                     const Tensor& like) {
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(like),
                                    from(IntHeaderOnlyArrayRef(shape)),
                                    from(IntHeaderOnlyArrayRef(strides)),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional<torch::stable::Device>()),
                                    from(std::optional<bool>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor no_tensor(ScalarType dtype, const Tensor& like) { return empty({0}, dtype, like); }

bool is_channel_last(const Tensor& like) { return like.stride(2) != 1 && like.stride(1) == 1; }

Tensor empty_like_layout(const Tensor& like, ScalarType dtype) {
  if (!is_channel_last(like)) return empty({like.size(0), like.size(1), like.size(2)}, dtype, like);
  // Not a transposed view of contiguous memory: a caller may change an output in place, and autograd forbids that for views.
  const int64_t row = std::max<int64_t>(like.size(1), 1);
  return empty_strided({like.size(0), like.size(1), like.size(2)}, {std::max<int64_t>(like.size(2), 1) * row, 1, row}, dtype,
                       like);
}

Tensor unit_stride(const Tensor& t) {
  if (t.stride(2) == 1 || t.stride(1) == 1) return t;
  return torch::stable::contiguous(t);
}

}  // namespace fastlm
