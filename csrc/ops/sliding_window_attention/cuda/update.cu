// Launch of update.cuh.
#include "ops/sliding_window_attention/cuda/update.cuh"

#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"

namespace fastlm::sliding_window_attention::cuda {

cudaError_t launch_update(const UpdateParams& p, const UpdateWorkspace& w, DType dtype, cudaStream_t stream) {
  const UpdatePlan plan = plan_update(p, dtype);
  if (plan.items == 0 || p.num_new == 0) return cudaSuccess;
  if (plan.items >= int64_t{1} << 30 || plan.rows >= int64_t{1} << 30) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned int>(plan.items));
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    using fastlm::cuda::launch;
    if constexpr (sizeof(T) < 8) {
      if (plan.tile_rows == 1) return launch<update<T, 1>>(grid, kUpdateThreads, bytes, stream, p, plan, w);
      if (plan.tile_rows == kMaxTileRows) return launch<update<T, 8>>(grid, kUpdateThreads, bytes, stream, p, plan, w);
    }
    return launch<update<T, 4>>(grid, kUpdateThreads, bytes, stream, p, plan, w);
  });
}

}  // namespace fastlm::sliding_window_attention::cuda
