// Launches of backward.cuh.
#include "core/cuda/dispatch.h"
#include "ops/grin_route/cuda/backward.cuh"
#include "ops/grin_route/cuda/launch.h"

namespace fastlm::grin_route::cuda {

cudaError_t launch_backward(const BackwardParams& p, DType dtype, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    return visit_form<T>(p.num_experts, [&]<int kLanes, int kPieces>() {
      return fastlm::cuda::launch<route_gradient<T, kLanes, kPieces>>(grid_of(p.num_tokens, kLanes), kThreads, 0, stream, p,
                                                                      whole_quads(p, sizeof(T)));
    });
  });
}

}  // namespace fastlm::grin_route::cuda
