// Choices made at run time that kernels take as template arguments.
#pragma once

#include "core/dtypes.h"

namespace fastlm::cuda {

// Calls f.template operator()<T>() with the element type.
template <class F>
auto visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f.template operator()<bfloat16>();
    case DType::kFloat16:
      return f.template operator()<float16>();
    case DType::kFloat64:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace fastlm::cuda
