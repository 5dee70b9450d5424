// grin_route on CUDA: checks -> parameters -> launch. Values behind device pointers are not looked at: the kernels read the seed,
// and ids that are no expert count as -1.
#include "adapter/cuda.h"

#include <string>

#include "ops/grin_route/call.h"
#include "ops/grin_route/checks.h"
#include "ops/grin_route/cuda/launch.h"

namespace fastlm::grin_route {
namespace {

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

Outputs forward(Tensor router_logits, OptionalTensor noise, OptionalTensor seed, OptionalTensor valid, int64_t top_k,
                double jitter_eps, bool training, std::string estimator) {
  constexpr const char* op = "grin_route";
  const Estimator kind = check_forward(op, router_logits, noise, seed, valid, top_k, jitter_eps, training, estimator);
  const DeviceGuard guard(router_logits.get_device_index());
  cuda::ForwardCall call{};
  Outputs outputs = begin_forward(call, router_logits, noise, valid, top_k, jitter_eps, training, kind);
  if (training && seed.has_value()) call.device_seed = data<int64_t>(*seed);
  check_launch(op, cuda::launch_forward(call, dtype_of(router_logits), current_stream(router_logits)));
  return outputs;
}

Tensor backward(Tensor dtopk_weights, Tensor router_logits, Tensor topk_ids, double jitter_eps, bool training,
                std::string estimator) {
  constexpr const char* op = "grin_route_backward";
  const Estimator kind = check_backward(op, dtopk_weights, router_logits, topk_ids, jitter_eps, training, estimator);
  const DeviceGuard guard(router_logits.get_device_index());
  BackwardParams p{};
  Tensor dlogits = begin_backward(p, dtopk_weights, router_logits, topk_ids, jitter_eps, kind);
  check_launch(op, cuda::launch_backward(p, dtype_of(router_logits), current_stream(router_logits)));
  return dlogits;
}

}  // namespace
}  // namespace fastlm::grin_route

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("grin_route", TORCH_BOX(&fastlm::grin_route::forward));
  m.impl("grin_route_backward", TORCH_BOX(&fastlm::grin_route::backward));
}
