// sliding_window_attention on CUDA, forward and backward: checks -> parameters -> launch. Values of cu_seqlens are not checked,
// since that would stop the device; the kernels clamp them instead. One decoding step: cuda_update.cpp.
#include "adapter/cuda.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "adapter/tensor.h"
#include "ops/sliding_window_attention/checks.h"
#include "ops/sliding_window_attention/cuda/launch.h"
#include "ops/sliding_window_attention/cuda_call.h"

namespace fastlm::sliding_window_attention {

void DeviceBounds::fill(DeviceSequences& d, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                        const OptionalTensor& cu_seqlens_k) {
  d.total_q = q.size(q.dim() - 3);
  d.total_k = k.size(k.dim() - 3);
  d.num_sequences = q.size(0);
  if (!cu_seqlens_q.has_value()) return;
  cu_q = torch::stable::contiguous(*cu_seqlens_q);
  cu_k = torch::stable::contiguous(*cu_seqlens_k);
  d.cu_q = cu_q->data_ptr();
  d.cu_k = cu_k->data_ptr();
  d.cu_q_64 = cu_q->scalar_type() == ScalarType::Long;
  d.cu_k_64 = cu_k->scalar_type() == ScalarType::Long;
  d.num_sequences = cu_q->size(0) - 1;
}

DeviceForward::DeviceForward(const char* op, const Inputs& inputs, const Options& options) : in_(inputs) {
  check_forward(op, in_.q, in_.k, in_.v, in_.cu_seqlens_q, in_.cu_seqlens_k, options);
  out = fastlm::empty(shape_of(in_.q), in_.q.scalar_type(), in_.q);
  lse = fastlm::empty(lse_shape(in_.q), lse_dtype(in_.q), in_.q);
  if (empty()) return;
  for (Tensor* t : {&in_.q, &in_.k, &in_.v}) *t = unit_inner_stride(*t);
  fill_params(params, in_.q, in_.k, in_.v, out, lse, options, {});
  bounds_.fill(params.device, in_.q, in_.k, in_.cu_seqlens_q, in_.cu_seqlens_k);
}

namespace {

using Window = std::vector<int64_t>;
using OptionalInt = std::optional<int64_t>;
using OptionalFloat = std::optional<double>;

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                   Window window_size, bool causal, OptionalFloat softmax_scale, double softcap,
                                   OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  constexpr const char* op = "sliding_window_attention";
  const Options options{window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k};
  const DeviceGuard guard(q.get_device_index());
  const DeviceForward pass(op, {q, k, v, cu_seqlens_q, cu_seqlens_k}, options);
  if (!pass.empty()) check_launch(op, cuda::launch_forward(pass.params, dtype_of(q), current_stream(q)));
  return {pass.out, pass.lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                            Tensor lse, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                            Window window_size, bool causal, OptionalFloat softmax_scale, double softcap,
                                            OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  constexpr const char* op = "sliding_window_attention_backward";
  const Options options{window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k};
  check_forward(op, q, k, v, cu_seqlens_q, cu_seqlens_k, options);
  check_backward(dout, dlse, q, out, lse);
  const DeviceGuard guard(q.get_device_index());
  const ScalarType dtype = q.scalar_type();
  const Tensor dq = empty(shape_of(q), dtype, q);
  if (q.numel() == 0) return {dq, zeros(shape_of(k), dtype, k), zeros(shape_of(k), dtype, k)};
  const Tensor dk = empty(shape_of(k), dtype, k);
  const Tensor dv = empty(shape_of(k), dtype, k);
  q = unit_inner_stride(q);
  k = unit_inner_stride(k);
  v = unit_inner_stride(v);
  out = unit_inner_stride(out);
  dout = unit_inner_stride(dout);
  lse = torch::stable::contiguous(lse);
  const Tensor row_delta = empty(shape_of(lse), lse.scalar_type(), q);

  BackwardParams p{};
  fill_params(p, q, k, v, out, lse, options, {});
  fill_gradients(p, dout, dlse, dq, dk, dv, row_delta);
  DeviceBounds bounds;
  bounds.fill(p.device, q, k, cu_seqlens_q, cu_seqlens_k);
  const auto bytes = static_cast<int64_t>(cuda::backward_workspace_bytes(p, dtype_of(q)));
  const Tensor workspace = empty({bytes}, ScalarType::Byte, q);
  check_launch(op, cuda::launch_backward(p, workspace.data_ptr(), dtype_of(q), current_stream(q)));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastlm::sliding_window_attention

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("sliding_window_attention", TORCH_BOX(&fastlm::sliding_window_attention::forward));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&fastlm::sliding_window_attention::backward));
}
