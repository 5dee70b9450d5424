// The choice of a backend, made on the host from what it knows: element type, layout, alignment, device. Never from group sizes.
#pragma once

#include "core/cuda/gemm/problem.h"

namespace fastlm::cuda::gemm {

// `b`: the layout of B; `parts`: of the epilogue. `streams`: kStream may be chosen; without it the number of rows has no say.
Backend row_backend(const RowProduct& p, DType dtype, Layout b, int parts, bool streams = true);
Backend outer_backend(const OuterProduct& p, DType dtype);

}  // namespace fastlm::cuda::gemm
