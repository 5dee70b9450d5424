#include "core/cuda/gemm/gemm.h"

#include "core/cuda/gemm/hopper_host.h"

namespace fastlm::cuda::gemm {

namespace {

// Up to how many rows a group on average reading B is all that takes time: 2 operations a row and element, of which an H200 does
// 230 and an A100 150 while it reads one byte; tiles of 128 rows would compute on mostly nothing.
constexpr int64_t kStreamedRows = 16;

bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

}  // namespace

Backend row_backend(const RowProduct& p, DType dtype, Layout b, int parts, bool streams) {
  if (!is_16_bit(dtype)) return Backend::kFma;
  const int64_t groups = p.rows.offsets == nullptr ? 1 : p.rows.groups;
  if (streams && p.rows.rows <= kStreamedRows * groups) return Backend::kStream;
  return hopper_applies(p, dtype, b, parts) ? Backend::kHopper : Backend::kMma;
}
Backend outer_backend(const OuterProduct& p, DType dtype) {
  if (!is_16_bit(dtype)) return Backend::kFma;
  return hopper_applies(p, dtype) ? Backend::kHopper : Backend::kMma;
}

}  // namespace fastlm::cuda::gemm
