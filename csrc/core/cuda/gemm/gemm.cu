#include "core/cuda/gemm/gemm.h"

namespace fastlm::cuda::gemm {

Backend row_backend(const RowProduct&, DType, Layout, int) { return Backend::kFma; }
Backend outer_backend(const OuterProduct&, DType) { return Backend::kFma; }

}  // namespace fastlm::cuda::gemm
