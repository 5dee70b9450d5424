// Calls of grin_route as both adapters begin them: new tensors, and the parameters that hold pointers into those and the
// arguments.
#pragma once

#include <tuple>

#include "adapter/tensor.h"
#include "ops/grin_route/params.h"

namespace fastlm::grin_route {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // weights, ids, counts, probs

inline void fill(Params& p, const Tensor& router_logits, int64_t top_k, double jitter_eps, const Estimator& estimator) {
  p.num_tokens = router_logits.size(0);
  p.num_experts = router_logits.size(1);
  p.top_k = top_k;
  p.logits = router_logits.data_ptr();
  p.logits_token_stride = router_logits.stride(0);
  p.logits_expert_stride = router_logits.stride(1);
  p.threshold = 2 * jitter_eps;
  p.estimator = estimator;
}

// Everything but the seed, which lies where the kernels run.
inline Outputs begin_forward(ForwardParams& p, const Tensor& router_logits, const OptionalTensor& noise,
                             const OptionalTensor& valid, int64_t top_k, double jitter_eps, bool training,
                             const Estimator& estimator) {
  fill(p, router_logits, top_k, jitter_eps, estimator);
  p.training = training;
  if (training && noise.has_value()) {
    p.noise = noise->data_ptr();
    p.noise_dtype = param_dtype(*noise);
    p.noise_token_stride = noise->stride(0);
    p.noise_pick_stride = noise->stride(1);
    p.noise_draw_stride = noise->stride(2);
  }
  if (valid.has_value()) {
    p.valid = data<bool>(*valid);
    p.valid_stride = valid->stride(0);
  }
  const ScalarType acc = accumulation_dtype(router_logits.scalar_type());
  const Tensor weights = empty({p.num_tokens, top_k}, acc, router_logits);
  const Tensor ids = empty({p.num_tokens, top_k}, ScalarType::Int, router_logits);
  const Tensor counts = zeros({p.num_experts}, ScalarType::Int, router_logits);
  const Tensor probs = empty({p.num_tokens, top_k}, acc, router_logits);
  p.weights = weights.data_ptr();
  p.ids = mutable_data<int32_t>(ids);
  p.counts = mutable_data<int32_t>(counts);
  p.probs = probs.data_ptr();
  return {weights, ids, counts, probs};
}

// Returns the gradient to be written.
inline Tensor begin_backward(BackwardParams& p, const Tensor& dtopk_weights, const Tensor& router_logits, const Tensor& topk_ids,
                             double jitter_eps, const Estimator& estimator) {
  fill(p, router_logits, topk_ids.size(1), jitter_eps, estimator);
  const Tensor dlogits = empty({p.num_tokens, p.num_experts}, router_logits.scalar_type(), router_logits);
  p.dweights = dtopk_weights.data_ptr();
  p.dweights_token_stride = dtopk_weights.stride(0);
  p.dweights_pick_stride = dtopk_weights.stride(1);
  p.ids = data<int32_t>(topk_ids);
  p.ids_token_stride = topk_ids.stride(0);
  p.ids_pick_stride = topk_ids.stride(1);
  p.dlogits = dlogits.data_ptr();
  return dlogits;
}

}  // namespace fastlm::grin_route
