// Launches of forward.cuh.
#include "core/cuda/dispatch.h"
#include "ops/grin_route/cuda/forward.cuh"

namespace fastlm::grin_route::cuda {

cudaError_t launch_forward(const ForwardCall& call, DType dtype, cudaStream_t stream) {
  if (call.num_tokens == 0) return cudaSuccess;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    return visit_form<T>(call.num_experts, [&]<int kLanes, int kPieces>() {
      const int64_t bytes = call.num_experts * static_cast<int64_t>(sizeof(int32_t));
      const bool count_here = bytes <= 48 * 1024;
      return fastlm::cuda::launch<route<T, kLanes, kPieces>>(grid_of(call.num_tokens, kLanes), kThreads,
                                                             static_cast<size_t>(count_here ? bytes : 0), stream, call,
                                                             whole_quads(call, sizeof(T)), count_here);
    });
  });
}

}  // namespace fastlm::grin_route::cuda
