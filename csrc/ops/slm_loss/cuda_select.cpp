// select_tokens on CUDA. The values of cu_seqlens lie on the device and are clamped there.
#include "adapter/cuda.h"

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "adapter/tensor.h"
#include "ops/slm_loss/checks.h"
#include "ops/slm_loss/cuda/select.h"
#include "ops/slm_loss/keys.h"

namespace fastlm::slm_loss {
namespace {

bool aligned(const Tensor& t, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % static_cast<uintptr_t>(bytes) == 0;
}

std::tuple<Tensor, Tensor, Tensor> select(Tensor score, Tensor eligible, OptionalTensor cu_seqlens, double keep_ratio,
                                          std::string tie_break, int64_t seed) {
  constexpr const char* op = "select_tokens";
  const bool random_ties = check_select(op, score, eligible, cu_seqlens, keep_ratio, tie_break);
  constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max() - 4096;  // positions a few rows further on fit as well
  FASTLM_CHECK_VALUE(score.numel() <= kMostTokens, op, ": score must have at most ", kMostTokens, " elements on CUDA, got ",
                     score.numel());
  const DeviceGuard guard(score.get_device_index());
  const ScalarType acc = accumulation_dtype(score.scalar_type());
  const Tensor scores = torch::stable::contiguous(score);
  const Tensor allowed = torch::stable::contiguous(eligible);
  const auto sizes = score.sizes();

  cuda::SelectParams p{};
  p.score = scores.data_ptr();
  p.allowed = data<bool>(allowed);
  p.total = score.numel();
  p.segments = 1;
  OptionalTensor bounds;
  if (cu_seqlens.has_value()) {
    bounds = torch::stable::contiguous(*cu_seqlens);
    p.cu_seqlens = bounds->data_ptr();
    p.cu_seqlens_64 = bounds->scalar_type() == ScalarType::Long;
    p.segments = bounds->size(0) - 1;
  }
  p.keep_ratio = keep_ratio;
  p.random_ties = random_ties;
  p.mixed_seed = mix_bits(static_cast<uint64_t>(seed));

  const Tensor mask = empty(std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Bool, score);
  const Tensor threshold = empty({p.segments}, acc, score);
  const Tensor counts = empty({p.segments, 3}, ScalarType::Long, score);
  const auto dtype = static_cast<DType>(kernel_index(score.scalar_type()));
  const cuda::SelectPlan plan = cuda::plan_select(p.total, p.segments, dtype, random_ties);
  const Tensor workspace = empty({plan.workspace_bytes}, ScalarType::Byte, score);
  p.mask = mutable_data<bool>(mask);
  p.threshold = threshold.data_ptr();
  p.counts = mutable_data<int64_t>(counts);
  p.workspace = workspace.data_ptr();
  p.vectors = aligned(scores, 16) && aligned(allowed, 4);
  check_launch(op, cuda::launch_select(p, plan, dtype, current_stream(score)));
  return {mask, threshold, counts};
}

}  // namespace
}  // namespace fastlm::slm_loss

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) { m.impl("select_tokens", TORCH_BOX(&fastlm::slm_loss::select)); }
