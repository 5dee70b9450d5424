// grin_route on CPU: checks -> parameters -> kernels of the CPU level in use. Tokens know nothing of each other, and counts are
// integers, so no result depends on how tokens are split over threads.
#include <algorithm>
#include <string>

#include "adapter/parallel.h"
#include "ops/grin_route/call.h"
#include "ops/grin_route/checks.h"
#include "ops/grin_route/cpu/kernels.h"

namespace fastlm::grin_route {
namespace {

// Tokens worth a thread of their own: some 20 microseconds. A multiple of every level's vector.
int64_t grain(int64_t experts, int64_t top_k) { return ceil_div(16384, 16 * experts * top_k) * 16; }

Outputs forward(Tensor router_logits, OptionalTensor noise, OptionalTensor seed, OptionalTensor valid, int64_t top_k,
                double jitter_eps, bool training, std::string estimator) {
  constexpr const char* op = "grin_route";
  const Estimator kind = check_forward(op, router_logits, noise, seed, valid, top_k, jitter_eps, training, estimator);
  ForwardParams p{};
  Outputs outputs = begin_forward(p, router_logits, noise, valid, top_k, jitter_eps, training, kind);
  if (training && seed.has_value()) p.seed = static_cast<uint64_t>(data<int64_t>(*seed)[0]);
  const auto run = FASTLM_CPU_KERNELS(grin_route_forward).forward[kernel_index(router_logits.scalar_type())];
  parallel_for(op, p.num_tokens, grain(p.num_experts, top_k), [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return outputs;
}

void check_ids(const char* op, const BackwardParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int32_t id = p.ids[t * p.ids_token_stride + j * p.ids_pick_stride];
      FASTLM_CHECK_INDEX(id >= -1 && id < p.num_experts, op, ": topk_ids must be in [0, ", p.num_experts, ") or -1, got ", id,
                         " at (", t, ", ", j, ")");
    }
  }
}

Tensor backward(Tensor dtopk_weights, Tensor router_logits, Tensor topk_ids, double jitter_eps, bool training,
                std::string estimator) {
  constexpr const char* op = "grin_route_backward";
  const Estimator kind = check_backward(op, dtopk_weights, router_logits, topk_ids, jitter_eps, training, estimator);
  BackwardParams p{};
  Tensor dlogits = begin_backward(p, dtopk_weights, router_logits, topk_ids, jitter_eps, kind);
  check_ids(op, p);

  const auto run = FASTLM_CPU_KERNELS(grin_route_backward).backward[kernel_index(router_logits.scalar_type())];
  parallel_for(op, p.num_tokens, grain(p.num_experts, p.top_k), [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return dlogits;
}

}  // namespace
}  // namespace fastlm::grin_route

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("grin_route", TORCH_BOX(&fastlm::grin_route::forward));
  m.impl("grin_route_backward", TORCH_BOX(&fastlm::grin_route::backward));
}
