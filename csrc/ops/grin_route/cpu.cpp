// grin_route on CPU: checks -> parameters -> kernels of the CPU level in use. Tokens know nothing of each other, and counts are
// integers, so no result depends on how tokens are split over threads.
#include <algorithm>
#include <string>
#include <tuple>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/grin_route/checks.h"
#include "ops/grin_route/cpu/kernels.h"

namespace fastlm::grin_route {
namespace {

// Tokens worth a thread of their own: some 20 microseconds. A multiple of every level's vector.
int64_t grain(int64_t experts, int64_t top_k) { return ceil_div(16384, 16 * experts * top_k) * 16; }

void fill(Params& p, const Tensor& router_logits, int64_t top_k, double jitter_eps, const Estimator& estimator) {
  p.num_tokens = router_logits.size(0);
  p.num_experts = router_logits.size(1);
  p.top_k = top_k;
  p.logits = router_logits.data_ptr();
  p.logits_token_stride = router_logits.stride(0);
  p.logits_expert_stride = router_logits.stride(1);
  p.threshold = 2 * jitter_eps;
  p.estimator = estimator;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor router_logits, OptionalTensor noise, OptionalTensor seed,
                                                   OptionalTensor valid, int64_t top_k, double jitter_eps, bool training,
                                                   std::string estimator) {
  constexpr const char* op = "grin_route";
  const Estimator kind = check_forward(op, router_logits, noise, seed, valid, top_k, jitter_eps, training, estimator);
  const ScalarType acc = accumulation_dtype(router_logits.scalar_type());
  const int64_t tokens = router_logits.size(0);
  const Tensor weights = empty({tokens, top_k}, acc, router_logits);
  const Tensor ids = empty({tokens, top_k}, ScalarType::Int, router_logits);
  const Tensor counts = zeros({router_logits.size(1)}, ScalarType::Int, router_logits);
  const Tensor probs = empty({tokens, top_k}, acc, router_logits);

  ForwardParams p{};
  fill(p, router_logits, top_k, jitter_eps, kind);
  p.training = training;
  if (training && noise.has_value()) {
    p.noise = noise->data_ptr();
    p.noise_dtype = param_dtype(*noise);
    p.noise_token_stride = noise->stride(0);
    p.noise_pick_stride = noise->stride(1);
    p.noise_draw_stride = noise->stride(2);
  }
  if (training && seed.has_value()) p.seed = static_cast<uint64_t>(data<int64_t>(*seed)[0]);
  if (valid.has_value()) {
    p.valid = data<bool>(*valid);
    p.valid_stride = valid->stride(0);
  }
  p.weights = weights.data_ptr();
  p.ids = mutable_data<int32_t>(ids);
  p.counts = mutable_data<int32_t>(counts);
  p.probs = probs.data_ptr();

  const auto run = FASTLM_CPU_KERNELS(grin_route_forward).forward[kernel_index(router_logits.scalar_type())];
  parallel_for(op, tokens, grain(p.num_experts, top_k), [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return {weights, ids, counts, probs};
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
  const ScalarType dtype = router_logits.scalar_type();
  const Tensor dlogits = empty({router_logits.size(0), router_logits.size(1)}, dtype, router_logits);
  BackwardParams p{};
  fill(p, router_logits, topk_ids.size(1), jitter_eps, kind);
  p.dweights = dtopk_weights.data_ptr();
  p.dweights_token_stride = dtopk_weights.stride(0);
  p.dweights_pick_stride = dtopk_weights.stride(1);
  p.ids = data<int32_t>(topk_ids);
  p.ids_token_stride = topk_ids.stride(0);
  p.ids_pick_stride = topk_ids.stride(1);
  p.dlogits = dlogits.data_ptr();
  check_ids(op, p);

  const auto run = FASTLM_CPU_KERNELS(grin_route_backward).backward[kernel_index(dtype)];
  parallel_for(op, p.num_tokens, grain(p.num_experts, p.top_k), [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return dlogits;
}

}  // namespace
}  // namespace fastlm::grin_route

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("grin_route", TORCH_BOX(&fastlm::grin_route::forward));
  m.impl("grin_route_backward", TORCH_BOX(&fastlm::grin_route::backward));
}
