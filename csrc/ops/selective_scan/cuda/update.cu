// Launches of update.cuh.
#include "ops/selective_scan/cuda/update.h"

#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "core/integers.h"
#include "ops/selective_scan/cuda/update.cuh"

namespace fastlm::selective_scan::cuda {
namespace {

bool wide_states(const UpdateParams& p) {
  const int64_t bytes = p.state_dtype == DType::kFloat32 ? 4 : p.state_dtype == DType::kFloat64 ? 8 : 2;
  return p.state_state_stride == 1 && reinterpret_cast<uintptr_t>(p.state_data) % (4 * bytes) == 0 &&
         p.state_dim_stride % 4 == 0 && p.state_batch_stride % 4 == 0;
}

}  // namespace

cudaError_t launch_update(const UpdateParams& p, int64_t num_slots, DType dtype, cudaStream_t stream) {
  if (p.batch == 0 || p.dim == 0) return cudaSuccess;
  const UpdateCall call{p, num_slots, wide_states(p)};
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() -> cudaError_t {
    const auto start = [&]<int kLanes>() {
      const dim3 grid(fastlm::cuda::limited(ceil_div(p.dim, kUpdateThreads / kLanes), 0x7fffffff),
                      fastlm::cuda::limited(ceil_div(p.batch, kUpdateRows), 65535));
      return fastlm::cuda::launch<update_kernel<T, kLanes>>(grid, kUpdateThreads, 0, stream, call);
    };
    return p.state <= 64 ? start.template operator()<4>() : start.template operator()<32>();
  });
}

}  // namespace fastlm::selective_scan::cuda
