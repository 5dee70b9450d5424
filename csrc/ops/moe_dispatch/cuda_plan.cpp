// moe_plan on CUDA: checks -> launch. Ids are not looked at: those that are no expert count as -1.
#include <tuple>

#include "adapter/cuda.h"
#include "adapter/tensor.h"
#include "ops/moe_dispatch/checks.h"
#include "ops/moe_dispatch/cuda/plan.h"

namespace fastlm::moe_dispatch {
namespace {

std::tuple<Tensor, Tensor, Tensor> plan(Tensor topk_ids, int64_t num_experts) {
  constexpr const char* op = "moe_plan";
  check_ids(op, topk_ids, num_experts);
  const DeviceGuard guard(topk_ids.get_device_index());
  const int64_t slots = topk_ids.numel();
  const Tensor offsets = empty({num_experts + 1}, ScalarType::Int, topk_ids);
  const Tensor perm = empty({slots}, ScalarType::Int, topk_ids);
  const Tensor inv = empty({slots}, ScalarType::Int, topk_ids);
  const Tensor workspace = empty({static_cast<int64_t>(cuda::plan_workspace(slots, num_experts))}, ScalarType::Byte, topk_ids);
  cuda::PlanCall call{};
  call.ids = topk_ids.data_ptr();
  call.ids_64 = topk_ids.scalar_type() == ScalarType::Long;
  call.token_stride = topk_ids.stride(0);
  call.pick_stride = topk_ids.stride(1);
  call.slots = slots;
  call.experts = num_experts;
  call.top_k = topk_ids.size(1);
  call.offsets = mutable_data<int32_t>(offsets);
  call.perm = mutable_data<int32_t>(perm);
  call.inv = mutable_data<int32_t>(inv);
  call.workspace = workspace.data_ptr();
  check_launch(op, cuda::launch_plan(call, current_stream(topk_ids)));
  return {offsets, perm, inv};
}

}  // namespace
}  // namespace fastlm::moe_dispatch

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) { m.impl("moe_plan", TORCH_BOX(&fastlm::moe_dispatch::plan)); }
