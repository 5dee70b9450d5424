// Argument checks of grin_route.
#include "ops/grin_route/checks.h"

#include <algorithm>

namespace fastlm::grin_route {
namespace {

// Expert counts and ids are int32.
constexpr int64_t kTokenLimit = int64_t{1} << 31;

Estimator check_estimator(const char* op, const std::string& name, bool training) {
  FASTLM_CHECK_VALUE(name == "v2" || name == "v2_star" || name == "v1", op, ": estimator must be 'v2', 'v2_star' or 'v1', got '",
                     name, "'");
  if (!training) return {1, 0, 1, 1};
  if (name == "v1") return {1, 0.5, 0.5, 2};
  if (name == "v2_star") return {0.5, 0.625, 1.0 / 3.0, 1};  // twice the gradient with respect to z / 2
  return {1, 0.25, 1.0 / 3.0, 1};
}

void check_logits(const char* op, const Tensor& router_logits, double jitter_eps) {
  check_floating(op, "router_logits", router_logits);
  check_dim(op, "router_logits", router_logits, 2, "(T, E)");
  FASTLM_CHECK_VALUE(router_logits.size(1) >= 2, op, ": router_logits must have shape (T, E) with at least 2 experts, got ",
                     shape_string(router_logits));
  FASTLM_CHECK_VALUE(router_logits.size(0) < kTokenLimit, op, ": router_logits must have less than ", kTokenLimit,
                     " tokens, got ", router_logits.size(0));
  FASTLM_CHECK_VALUE(jitter_eps >= 0, op, ": jitter_eps must not be negative, got ", jitter_eps);
}

}  // namespace

Estimator check_forward(const char* op, const Tensor& router_logits, const OptionalTensor& noise, const OptionalTensor& seed,
                        const OptionalTensor& valid, int64_t top_k, double jitter_eps, bool training,
                        const std::string& estimator) {
  check_logits(op, router_logits, jitter_eps);
  const int64_t tokens = router_logits.size(0);
  const int64_t experts = router_logits.size(1);
  const int64_t most = std::min(kMaxPicks, experts);
  FASTLM_CHECK_VALUE(top_k >= 1 && top_k <= most, op, ": top_k must be from 1 to ", most, ", got ", top_k);
  const Estimator found = check_estimator(op, estimator, training);
  if (noise.has_value()) {
    check_shape(op, "noise", *noise, {tokens, top_k, experts + 1});
    const bool fits =
        noise->scalar_type() == ScalarType::Float || noise->scalar_type() == accumulation_dtype(router_logits.scalar_type());
    FASTLM_CHECK_VALUE(fits, op, ": noise must have dtype float32",
                       router_logits.scalar_type() == ScalarType::Double ? " or float64" : "", ", got ",
                       dtype_name(noise->scalar_type()));
    check_same_device(op, "noise", *noise, "router_logits", router_logits);
  }
  if (seed.has_value()) {
    check_shape(op, "seed", *seed, {1});
    FASTLM_CHECK_VALUE(seed->scalar_type() == ScalarType::Long, op, ": seed must have dtype int64, got ",
                       dtype_name(seed->scalar_type()));
    check_same_device(op, "seed", *seed, "router_logits", router_logits);
  }
  if (valid.has_value()) {
    check_shape(op, "valid", *valid, {tokens});
    FASTLM_CHECK_VALUE(valid->scalar_type() == ScalarType::Bool, op, ": valid must have dtype bool, got ",
                       dtype_name(valid->scalar_type()));
    check_same_device(op, "valid", *valid, "router_logits", router_logits);
  }
  FASTLM_CHECK_VALUE(!training || noise.has_value() != seed.has_value(), op,
                     ": training needs exactly one of noise and seed, got ", noise.has_value() ? "both" : "neither");
  return found;
}

Estimator check_backward(const char* op, const Tensor& dtopk_weights, const Tensor& router_logits, const Tensor& topk_ids,
                         double jitter_eps, bool training, const std::string& estimator) {
  check_logits(op, router_logits, jitter_eps);
  const ScalarType acc = accumulation_dtype(router_logits.scalar_type());
  const int64_t most = std::min(kMaxPicks, router_logits.size(1));
  check_dim(op, "topk_ids", topk_ids, 2, "(T, k)");
  FASTLM_CHECK_VALUE(topk_ids.size(1) >= 1 && topk_ids.size(1) <= most, op, ": topk_ids must have shape (T, k) with k from 1 to ",
                     most, ", got ", shape_string(topk_ids));
  check_shape(op, "topk_ids", topk_ids, {router_logits.size(0), topk_ids.size(1)});
  FASTLM_CHECK_VALUE(topk_ids.scalar_type() == ScalarType::Int, op, ": topk_ids must have dtype int32, got ",
                     dtype_name(topk_ids.scalar_type()));
  check_same_device(op, "topk_ids", topk_ids, "router_logits", router_logits);
  check_shape(op, "dtopk_weights", dtopk_weights, {topk_ids.size(0), topk_ids.size(1)});
  FASTLM_CHECK_VALUE(dtopk_weights.scalar_type() == acc, op, ": dtopk_weights must have dtype ", dtype_name(acc), ", got ",
                     dtype_name(dtopk_weights.scalar_type()));
  check_same_device(op, "dtopk_weights", dtopk_weights, "router_logits", router_logits);
  return check_estimator(op, estimator, training);
}

}  // namespace fastlm::grin_route
