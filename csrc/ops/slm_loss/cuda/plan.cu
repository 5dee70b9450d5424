// Sizes of waves and panels, from shapes alone.
#include <algorithm>

#include "core/cuda/dispatch.h"
#include "core/cuda/gemm/gemm.h"
#include "core/integers.h"
#include "ops/slm_loss/cuda/logits.cuh"
#include "ops/slm_loss/cuda/nll.h"

namespace fastlm::slm_loss::cuda {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kRowTile = 128, kWordTile = 256;

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
int64_t acc_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// How many fit, in whole tiles, at least one.
int64_t fitting(int64_t bytes, int64_t each, int64_t tile, int64_t most) {
  return std::clamp(bytes / std::max<int64_t>(each, 1) / tile * tile, tile, most);
}

// Gathered rows begin at multiples of 16 bytes.
int64_t row_stride(const Head& head, DType dtype) {
  const int64_t unit = 16 / element_bytes(dtype);
  return ceil_div(head.hidden_size, unit) * unit;
}

}  // namespace

ForwardPlan plan_forward(const Head& head, DType dtype, bool entropy) {
  ForwardPlan plan{};
  plan.stride = row_stride(head, dtype);
  const Wave wave{std::min(kMostRows, head.tokens), plan.stride, nullptr, nullptr};
  const auto product = logits_product(head, {}, wave, 0, 0, head.vocab, element_bytes(dtype));
  plan.backend = fastlm::cuda::gemm::row_backend(product, dtype, fastlm::cuda::gemm::Layout::kDepth, 1, false);
  plan.slabs = ceil_div(head.vocab, fastlm::cuda::gemm::slab_columns(plan.backend, 1));
  const int64_t most = std::min(fitting(128 * kMiB, plan.slabs * (entropy ? 3 : 2) * acc_bytes(dtype), kRowTile, kMostRows),
                                fitting(128 * kMiB, plan.stride * element_bytes(dtype), kRowTile, kMostRows));
  plan.rows = std::min(most, head.tokens);
  return plan;
}

// 192 MiB for what a wave holds of h, 248 MiB with a panel of dlogits and its sums of columns.
BackwardPlan plan_backward(const Head& head, DType dtype) {
  BackwardPlan plan{};
  plan.stride = row_stride(head, dtype);
  const int64_t row = plan.stride * element_bytes(dtype) + head.hidden_size * acc_bytes(dtype);
  plan.most_rows = fitting(192 * kMiB, row, kRowTile, kMostRows);
  const int64_t left = 248 * kMiB - plan.most_rows * row;
  const int64_t word = plan.most_rows * element_bytes(dtype) + plan.most_rows / 16 * acc_bytes(dtype);
  plan.words = std::min(fitting(left, word, kWordTile, kMostWords), ceil_div(head.vocab, 8) * 8);
  plan.rows = std::min(plan.most_rows, head.tokens);
  return plan;
}

cudaError_t launch_forward(const ForwardCall& call, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() { return run_forward<T>(call, stream); });
}

cudaError_t launch_backward(const BackwardCall& call, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() { return run_backward<T>(call, stream); });
}

}  // namespace fastlm::slm_loss::cuda
