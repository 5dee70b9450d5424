// Launches of backward.cuh for one element type; included by the files that hold its instances.
#pragma once

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/backward.cuh"
#include "ops/sliding_window_attention/cuda/launch.h"

namespace fastlm::sliding_window_attention::cuda {

template <class T, int kDim, Gradient kGradient>
cudaError_t launch_gradient(const BackwardParams& p, cudaStream_t stream) {
  using Shape = BackwardShape<kDim, kGradient>;
  const TileOptions options{Scoring<float>(p), vectors_apply(p, DTypeOf<T>::value)};
  return for_all_items(Shape::items(p), [&](dim3 grid, int64_t first) {
    return fastlm::cuda::launch<backward_mma<T, kDim, kGradient>>(grid, Shape::kThreads, Shape::kSharedBytes, stream, p, options,
                                                                  first);
  });
}

template <class T, int kDim>
cudaError_t launch_backward_dim(const BackwardParams& p, cudaStream_t stream) {
  if (const cudaError_t status = launch_gradient<T, kDim, Gradient::kQueries>(p, stream); status != cudaSuccess) return status;
  if constexpr (kDim <= 128) {
    return launch_gradient<T, kDim, Gradient::kKeysAndValues>(p, stream);
  } else {
    if (const cudaError_t status = launch_gradient<T, kDim, Gradient::kKeys>(p, stream); status != cudaSuccess) return status;
    return launch_gradient<T, kDim, Gradient::kValues>(p, stream);
  }
}

template <class T>
cudaError_t launch_backward_dims(const BackwardParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_backward_dim<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch_backward_dim<T, 128>(p, stream);
  return launch_backward_dim<T, 256>(p, stream);
}

}  // namespace fastlm::sliding_window_attention::cuda
