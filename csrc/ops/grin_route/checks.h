// Argument checks of grin_route, shared by the CPU and the CUDA twin.
#pragma once

#include <string>

#include "adapter/check.h"
#include "ops/grin_route/params.h"

namespace fastlm::grin_route {

// Each throws unless the call is sound, and returns what the estimator's name means.
Estimator check_forward(const char* op, const Tensor& router_logits, const OptionalTensor& noise, const OptionalTensor& seed,
                        const OptionalTensor& valid, int64_t top_k, double jitter_eps, bool training,
                        const std::string& estimator);
// Values of topk_ids are not looked at.
Estimator check_backward(const char* op, const Tensor& dtopk_weights, const Tensor& router_logits, const Tensor& topk_ids,
                         double jitter_eps, bool training, const std::string& estimator);

}  // namespace fastlm::grin_route
