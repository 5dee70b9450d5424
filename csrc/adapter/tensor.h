// Tensors as the adapters see them: short names over the LibTorch Stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/dtypes.h"
#include "core/integers.h"

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "float32", "bfloat16", ...: the names Python uses.
const char* dtype_name(ScalarType dtype);

// "(2, 16, 128)".
std::string shape_string(const Tensor& t);
std::string shape_string(const std::vector<int64_t>& shape);

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape);
bool is_floating(ScalarType dtype);

// float64 for float64, else float32.
ScalarType accumulation_dtype(ScalarType dtype);

// Run-time dtype of a parameter pointer; only for floating tensors.
DType param_dtype(const Tensor& t);

// Fresh uninitialised tensor, contiguous, on the device of `like`.
Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like);
Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype,
                     const Tensor& like);
Tensor zeros(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like);

// What an output that does not apply looks like: shape (0,).
Tensor no_tensor(ScalarType dtype, const Tensor& like);

// A tensor of shape (B, D, L) for a result that mirrors `like`: channel-last memory (unit stride over D) if `like` has it, else
// contiguous. The same rule stands in `_registration/layout.py` for the fake kernels.
bool is_channel_last(const Tensor& like);
Tensor empty_like_layout(const Tensor& like, ScalarType dtype);

// `t` itself if it has unit stride over its last or its middle dimension, else a contiguous copy. For (B, D, L) activations.
Tensor unit_stride(const Tensor& t);

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Place of an element type in the kernels' tables.
inline int kernel_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return static_cast<int>(DType::kBFloat16);
    case ScalarType::Half:
      return static_cast<int>(DType::kFloat16);
    case ScalarType::Double:
      return static_cast<int>(DType::kFloat64);
    default:
      return static_cast<int>(DType::kFloat32);
  }
}

// Calls f.template operator()<T>() with the element type of `dtype`; the caller has checked that it is floating.
template <class F>
auto visit_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f.template operator()<bfloat16>();
    case ScalarType::Half:
      return f.template operator()<float16>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace fastlm
