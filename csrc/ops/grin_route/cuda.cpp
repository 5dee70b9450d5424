// grin_route on CUDA: checks -> parameters -> launch. Values behind device pointers are not looked at: the kernels read the seed,
// and ids that are no expert count as -1.
#include "adapter/cuda.h"

#include <string>
#include <tuple>

#include "adapter/tensor.h"
#include "ops/grin_route/checks.h"
#include "ops/grin_route/cuda/launch.h"

namespace fastlm::grin_route {
namespace {

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

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
  const DeviceGuard guard(router_logits.get_device_index());
  const ScalarType acc = accumulation_dtype(router_logits.scalar_type());
  const int64_t tokens = router_logits.size(0);
  const Tensor weights = empty({tokens, top_k}, acc, router_logits);
  const Tensor ids = empty({tokens, top_k}, ScalarType::Int, router_logits);
  const Tensor counts = zeros({router_logits.size(1)}, ScalarType::Int, router_logits);
  const Tensor probs = empty({tokens, top_k}, acc, router_logits);

  cuda::ForwardCall call{};
  fill(call, router_logits, top_k, jitter_eps, kind);
  call.training = training;
  if (training && noise.has_value()) {
    call.noise = noise->data_ptr();
    call.noise_dtype = param_dtype(*noise);
    call.noise_token_stride = noise->stride(0);
    call.noise_pick_stride = noise->stride(1);
    call.noise_draw_stride = noise->stride(2);
  }
  if (training && seed.has_value()) call.device_seed = data<int64_t>(*seed);
  if (valid.has_value()) {
    call.valid = data<bool>(*valid);
    call.valid_stride = valid->stride(0);
  }
  call.weights = weights.data_ptr();
  call.ids = mutable_data<int32_t>(ids);
  call.counts = mutable_data<int32_t>(counts);
  call.probs = probs.data_ptr();
  check_launch(op, cuda::launch_forward(call, dtype_of(router_logits), current_stream(router_logits)));
  return {weights, ids, counts, probs};
}

Tensor backward(Tensor dtopk_weights, Tensor router_logits, Tensor topk_ids, double jitter_eps, bool training,
                std::string estimator) {
  constexpr const char* op = "grin_route_backward";
  const Estimator kind = check_backward(op, dtopk_weights, router_logits, topk_ids, jitter_eps, training, estimator);
  const DeviceGuard guard(router_logits.get_device_index());
  const Tensor dlogits = empty({router_logits.size(0), router_logits.size(1)}, router_logits.scalar_type(), router_logits);
  BackwardParams p{};
  fill(p, router_logits, topk_ids.size(1), jitter_eps, kind);
  p.dweights = dtopk_weights.data_ptr();
  p.dweights_token_stride = dtopk_weights.stride(0);
  p.dweights_pick_stride = dtopk_weights.stride(1);
  p.ids = data<int32_t>(topk_ids);
  p.ids_token_stride = topk_ids.stride(0);
  p.ids_pick_stride = topk_ids.stride(1);
  p.dlogits = dlogits.data_ptr();
  check_launch(op, cuda::launch_backward(p, dtype_of(router_logits), current_stream(router_logits)));
  return dlogits;
}

}  // namespace
}  // namespace fastlm::grin_route

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("grin_route", TORCH_BOX(&fastlm::grin_route::forward));
  m.impl("grin_route_backward", TORCH_BOX(&fastlm::grin_route::backward));
}
