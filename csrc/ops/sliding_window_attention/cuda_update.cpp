// sliding_window_attention_update on CUDA: checks -> parameters -> launch. Values of cache_seqlens are not checked, since that
// would stop the device; the kernel clamps them instead.
#include "ops/sliding_window_attention/cuda_update.h"

#include "ops/sliding_window_attention/checks.h"

namespace fastlm::sliding_window_attention {

DeviceUpdate::DeviceUpdate(const char* op, const UpdateInputs& inputs) : in_(inputs) {
  check_update(op, in_.q, in_.k, in_.v, in_.k_cache, in_.v_cache, in_.cache_seqlens, in_.window_size, in_.softmax_scale,
               in_.rotary_cos, in_.rotary_sin);
  // Whatever cache_seqlens says, the new tokens stand at positions m - 1 and above.
  FASTLM_CHECK_INDEX(!in_.rotary_cos.has_value() || in_.q.size(0) == 0 || in_.rotary_cos->size(0) >= in_.q.size(1), op,
                     ": cache_seqlens must lead to positions below ", in_.rotary_cos->size(0),
                     " (rows of rotary_cos), got position ", in_.q.size(1) - 1, " or more at index 0");
  out = fastlm::empty(shape_of(in_.q), in_.q.scalar_type(), in_.q);
  if (empty()) return;
  fill_update(p_, in_, out);
  in_.cache_seqlens = torch::stable::contiguous(in_.cache_seqlens);
  p_.device_seqlens = in_.cache_seqlens.data_ptr();
  p_.device_seqlens_64 = in_.cache_seqlens.scalar_type() == ScalarType::Long;

  const DType dtype = static_cast<DType>(kernel_index(in_.q.scalar_type()));
  const cuda::UpdatePlan plan = cuda::plan_update(p_, dtype);
  num_counters_ = cuda::num_update_counters(p_, plan);
  if (num_counters_ == 0) return;
  const int64_t acc = dtype == DType::kFloat64 ? 8 : 4;
  const int64_t sums = cuda::num_update_sums(p_, plan) * acc, stats = cuda::num_update_stats(plan) * acc;
  memory_ = fastlm::empty({sums + stats + num_counters_ * 4}, ScalarType::Byte, in_.q);
  char* const at = mutable_data<char>(*memory_);
  w_ = {at, at + sums, reinterpret_cast<int32_t*>(at + sums + stats)};
}

namespace {

Tensor update(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
              std::vector<int64_t> window_size, std::optional<double> softmax_scale, OptionalTensor rotary_cos,
              OptionalTensor rotary_sin) {
  constexpr const char* op = "sliding_window_attention_update";
  const DeviceUpdate step(op, {q, k, v, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, rotary_cos, rotary_sin});
  if (step.empty()) return step.out;
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  if (step.num_counters() > 0) {
    check_launch(op, cudaMemsetAsync(step.workspace().counters, 0, static_cast<size_t>(step.num_counters()) * 4, stream));
  }
  check_launch(op,
               cuda::launch_update(step.params(), step.workspace(), static_cast<DType>(kernel_index(q.scalar_type())), stream));
  return step.out;
}

}  // namespace
}  // namespace fastlm::sliding_window_attention

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("sliding_window_attention_update", TORCH_BOX(&fastlm::sliding_window_attention::update));
}
