// scan_swa on CUDA: a selective scan and a sliding-window attention that need nothing of each other, in one launch where the pair
// fits one (cuda/launch.h), else in one after the other. Each half computes the tiles of its own operator, so its bits are the
// same.
#include "adapter/cuda.h"
#include "adapter/tensor.h"
#include "ops/scan_swa/cuda/launch.h"
#include "ops/selective_scan/cuda/launch.h"
#include "ops/selective_scan/cuda_call.h"
#include "ops/sliding_window_attention/cuda/launch.h"
#include "ops/sliding_window_attention/cuda_call.h"

namespace fastlm::scan_swa {
namespace {

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                           OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                                                           OptionalTensor initial_state, Tensor q, Tensor k, Tensor v,
                                                           OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_q,
                                                           OptionalTensor cu_seqlens_k, std::vector<int64_t> window_size,
                                                           bool causal, std::optional<double> softmax_scale, double softcap,
                                                           std::optional<int64_t> max_seqlen_q,
                                                           std::optional<int64_t> max_seqlen_k) {
  constexpr const char* op = "scan_swa";
  const DeviceGuard guard(u.get_device_index());
  selective_scan::DeviceForward scan(op, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens}, false);
  const sliding_window_attention::DeviceForward attention(
      op, {q, k, v, cu_seqlens_q, cu_seqlens_k}, {window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k});
  check_same_device(op, "q", q, "u", u);
  const DType scan_dtype = dtype_of(u), attention_dtype = dtype_of(q);
  const cudaStream_t stream = current_stream(u);
  const bool both = !scan.empty() && !attention.empty();
  if (both && cuda::fuses(scan.call.p, scan_dtype, attention.params, attention_dtype)) {
    check_launch(op, cuda::launch_fused(scan.call, attention.params, scan_dtype, stream));
  } else {
    if (!scan.empty()) {
      scan.split();
      check_launch(op, selective_scan::cuda::launch_forward(scan.call, scan.begin_states(), scan_dtype, stream));
    }
    if (!attention.empty()) {
      check_launch(op, sliding_window_attention::cuda::launch_forward(attention.params, attention_dtype, stream));
    }
  }
  return {scan.out, scan.last_state, scan.chunk_states, attention.out, attention.lse};
}

}  // namespace
}  // namespace fastlm::scan_swa

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) { m.impl("scan_swa", TORCH_BOX(&fastlm::scan_swa::forward)); }
