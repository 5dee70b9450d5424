// To be replaced by plan.h.
#include "core/cuda/device.cuh"
#include "core/cuda/launch.h"
#include "ops/moe_dispatch/cuda/temporary_plan.h"

namespace fastlm::moe_dispatch::cuda {
namespace {

__global__ void __launch_bounds__(32) plan_kernel(const __grid_constant__ TemporaryPlan p) {
  if (threadIdx.x != 0) return;
  const auto id_of = [&](int64_t s) {
    const int64_t id = fastlm::cuda::load_index(p.ids, p.wide, s);
    return id < 0 || id >= p.experts ? p.experts : id;
  };
  int32_t row = 0;
  for (int64_t e = 0; e <= p.experts; ++e) {
    p.offsets[e] = row;
    for (int64_t s = 0; s < p.slots; ++s) {
      if (id_of(s) != e) continue;
      p.perm[row] = static_cast<int32_t>(s);
      p.inv[s] = row++;
    }
  }
}

}  // namespace

cudaError_t launch_temporary_plan(const TemporaryPlan& p, cudaStream_t stream) {
  return fastlm::cuda::launch<plan_kernel>(dim3(1), 32, 0, stream, p);
}

}  // namespace fastlm::moe_dispatch::cuda
