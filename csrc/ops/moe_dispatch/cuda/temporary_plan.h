// To be replaced by plan.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastlm::moe_dispatch::cuda {

struct TemporaryPlan {
  const void* ids;
  bool wide;
  int64_t slots, experts;
  int32_t *offsets, *perm, *inv;
};

cudaError_t launch_temporary_plan(const TemporaryPlan& p, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
