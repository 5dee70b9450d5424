#include "ops/moe_dispatch/cuda_call.h"

#include "ops/moe_dispatch/cuda/plan.h"

namespace fastlm::moe_dispatch {

DeviceWeight device_weight(const Tensor& t, int64_t summed) {
  const auto is_unit = [](const Tensor& w, int64_t dim) { return w.stride(dim) == 1 || w.size(dim) <= 1; };
  const Tensor held = is_unit(t, 1) || is_unit(t, 2) ? t : torch::stable::contiguous(t);
  const bool by_depth = is_unit(held, summed);
  const int64_t line = by_depth ? 3 - summed : summed;
  return {held,
          {held.data_ptr(), held.stride(line), held.stride(0), nullptr, held.size(line)},
          by_depth ? gemm::Layout::kDepth : gemm::Layout::kWidth};
}

Tensor lines_of(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

Tensor in_acc(const Tensor& t, const Tensor& like) {
  return torch::stable::contiguous(torch::stable::to(t, accumulation_dtype(like.scalar_type())));
}
OptionalTensor in_acc(const OptionalTensor& t, const Tensor& like) {
  return t.has_value() ? OptionalTensor(in_acc(*t, like)) : OptionalTensor();
}

DevicePlan device_plan(const char* op, const Tensor& topk_ids, int64_t experts, bool with_tokens) {
  const int64_t rows = topk_ids.numel();
  const auto integers = [&](int64_t n) { return empty({n}, ScalarType::Int, topk_ids); };
  DevicePlan plan{integers(experts + 1), integers(rows), integers(rows), integers(with_tokens ? rows : 0), {}};
  plan.rows = {plan.offsets.data_ptr(), false, experts, rows, nullptr, 0};
  const Tensor workspace = empty({static_cast<int64_t>(cuda::plan_workspace(rows, experts))}, ScalarType::Byte, topk_ids);
  cuda::PlanCall call{};
  call.ids = topk_ids.data_ptr();
  call.ids_64 = topk_ids.scalar_type() == ScalarType::Long;
  call.token_stride = topk_ids.stride(0);
  call.pick_stride = topk_ids.stride(1);
  call.slots = rows;
  call.experts = experts;
  call.top_k = topk_ids.size(1);
  call.offsets = mutable_data<int32_t>(plan.offsets);
  call.perm = mutable_data<int32_t>(plan.perm);
  call.inv = mutable_data<int32_t>(plan.inv);
  if (with_tokens) call.tokens = mutable_data<int32_t>(plan.token);
  call.workspace = workspace.data_ptr();
  check_launch(op, cuda::launch_plan(call, current_stream(topk_ids)));
  return plan;
}

gemm::Matrix copied_rows(int64_t rows, int64_t columns, const void* data) { return {data, columns, 0, nullptr, rows}; }

gemm::Matrix sorted_rows(const char* op, const Tensor& t, const DevicePlan& plan, const OptionalTensor& to) {
  if (!to.has_value()) return {t.data_ptr(), t.stride(0), 0, data<int32_t>(plan.token), t.size(0)};
  const cuda::CopyCall copy{plan.rows,     t.data_ptr(), t.stride(0), t.size(1), t.size(0), data<int32_t>(plan.token),
                            to->data_ptr()};
  check_launch(op, cuda::launch_copy(copy, dtype_of(t), current_stream(t)));
  return copied_rows(plan.rows.rows, t.size(1), to->data_ptr());
}

void combine(const char* op, const Tensor& rows, const DevicePlan& plan, const OptionalTensor& weights, int64_t top_k,
             const Tensor& out) {
  const cuda::CombineCall call{plan.rows, rows.data_ptr(), data<int32_t>(plan.inv), pointer(weights), out.size(0),
                               top_k,     out.size(1),     out.data_ptr()};
  check_launch(op, cuda::launch_combine(call, dtype_of(out), current_stream(out)));
}

}  // namespace fastlm::moe_dispatch
