// moe_plan on CUDA: checks -> launch. Ids are not looked at: those that are no expert count as -1.
#include <tuple>

#include "adapter/cuda.h"
#include "ops/moe_dispatch/checks.h"
#include "ops/moe_dispatch/cuda_call.h"

namespace fastlm::moe_dispatch {
namespace {

std::tuple<Tensor, Tensor, Tensor> plan(Tensor topk_ids, int64_t num_experts) {
  constexpr const char* op = "moe_plan";
  check_ids(op, topk_ids, num_experts);
  const DeviceGuard guard(topk_ids.get_device_index());
  const DevicePlan plan = device_plan(op, topk_ids, num_experts, false);
  return {plan.offsets, plan.perm, plan.inv};
}

}  // namespace
}  // namespace fastlm::moe_dispatch

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) { m.impl("moe_plan", TORCH_BOX(&fastlm::moe_dispatch::plan)); }
