#include "core/cuda/gemm/gemm.h"

#include "core/cuda/gemm/hopper_host.h"

namespace fastlm::cuda::gemm {

Backend row_backend(const RowProduct& p, DType dtype, Layout b, int parts) {
  return hopper_applies(p, dtype, b, parts) ? Backend::kHopper : Backend::kFma;
}
Backend outer_backend(const OuterProduct& p, DType dtype) { return hopper_applies(p, dtype) ? Backend::kHopper : Backend::kFma; }

}  // namespace fastlm::cuda::gemm
