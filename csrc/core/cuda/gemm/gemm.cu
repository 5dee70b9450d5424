#include "core/cuda/gemm/gemm.h"

#include "core/cuda/gemm/hopper_host.h"

namespace fastlm::cuda::gemm {

namespace {

Backend without_tile_copies(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? Backend::kMma : Backend::kFma;
}

}  // namespace

Backend row_backend(const RowProduct& p, DType dtype, Layout b, int parts) {
  return hopper_applies(p, dtype, b, parts) ? Backend::kHopper : without_tile_copies(dtype);
}
Backend outer_backend(const OuterProduct& p, DType dtype) {
  return hopper_applies(p, dtype) ? Backend::kHopper : without_tile_copies(dtype);
}

}  // namespace fastlm::cuda::gemm
