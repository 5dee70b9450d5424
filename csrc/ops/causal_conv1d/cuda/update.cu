// Launches of update.cuh.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/causal_conv1d/cuda/launch.h"
#include "ops/causal_conv1d/cuda/update.cuh"

namespace fastlm::causal_conv1d::cuda {
cudaError_t launch_update(const UpdateParams& p, DType dtype, cudaStream_t stream) {
  const int64_t total = p.batch * p.dim;
  if (total == 0) return cudaSuccess;
  const int64_t blocks = (total + 127) / 128;
  fastlm::cuda::visit_dtype(
      dtype, [&]<class T>() { fastlm::cuda::launch<update<T>>(dim3(fastlm::cuda::limited(blocks, 65535)), 128, 0, stream, p); });
  return cudaGetLastError();
}

}  // namespace fastlm::causal_conv1d::cuda
