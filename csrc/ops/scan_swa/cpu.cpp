// scan_swa on CPU: a selective scan and a sliding-window attention that need nothing of each other, in one parallel region.
// Threads take blocks of channels and blocks of queries from one queue, the scan's first: they are fewer and longer, and short
// pieces at the end leave nobody waiting. Each half runs the kernels of its own operator on the same pieces, so its bits are the
// same.
#include "adapter/pipeline.h"
#include "adapter/tensor.h"
#include "ops/selective_scan/call.h"
#include "ops/sliding_window_attention/call.h"

namespace fastlm::scan_swa {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                           OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                                                           OptionalTensor initial_state, Tensor q, Tensor k, Tensor v,
                                                           OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_q,
                                                           OptionalTensor cu_seqlens_k, std::vector<int64_t> window_size,
                                                           bool causal, std::optional<double> softmax_scale, double softcap,
                                                           std::optional<int64_t> max_seqlen_q,
                                                           std::optional<int64_t> max_seqlen_k) {
  constexpr const char* op = "scan_swa";
  const selective_scan::Forward scan(op, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens}, false);
  const sliding_window_attention::Forward attention(op, {q, k, v, cu_seqlens_q, cu_seqlens_k},
                                                    {window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k});
  enum : int64_t { kPrepare, kScan, kAttend, kPhases };
  const Phase phases[kPhases] = {{scan.prepare_pieces(), -1}, {scan.scan_pieces(), kPrepare}, {attention.pieces(), -1}};
  run_pipeline(
      op, kPhases, [&](int64_t i) { return phases[i]; },
      [&](int64_t i, int64_t piece) {
        if (i == kPrepare) scan.prepare(piece, piece + 1);
        if (i == kScan) scan.scan(piece, piece + 1);
        if (i == kAttend) attention.attend(piece, piece + 1);
      });
  return {scan.out, scan.last_state, scan.chunk_states, attention.out, attention.lse};
}

}  // namespace
}  // namespace fastlm::scan_swa

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("scan_swa", TORCH_BOX(&fastlm::scan_swa::forward)); }
