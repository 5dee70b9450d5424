// The choice of a backend, made on the host from what it knows: element type, layout, alignment, device. Never from group sizes.
#pragma once

#include "core/cuda/gemm/problem.h"

namespace fastlm::cuda::gemm {

// `b`: the layout of B; `parts`: of the epilogue.
Backend row_backend(const RowProduct& p, DType dtype, Layout b, int parts);
Backend outer_backend(const OuterProduct& p, DType dtype);

}  // namespace fastlm::cuda::gemm
