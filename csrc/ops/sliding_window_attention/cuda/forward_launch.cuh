// Launch of forward.cuh for one element type; included by the files that hold its instances.
#pragma once

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/forward.cuh"
#include "ops/sliding_window_attention/cuda/launch.h"

namespace fastlm::sliding_window_attention::cuda {

template <class T, int kDim>
cudaError_t launch_forward_dim(const Params& p, cudaStream_t stream) {
  using Shape = ForwardShape<kDim>;
  const TileOptions options{Scoring<float>(p), vectors_apply(p, DTypeOf<T>::value)};
  return for_all_items(Shape::items(p), [&](dim3 grid, int64_t first) {
    return fastlm::cuda::launch<forward_mma<T, kDim>>(grid, Shape::kThreads, Shape::kSharedBytes, stream, p, options, first);
  });
}

template <class T>
cudaError_t launch_forward_dims(const Params& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_forward_dim<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch_forward_dim<T, 128>(p, stream);
  return launch_forward_dim<T, 256>(p, stream);
}

}  // namespace fastlm::sliding_window_attention::cuda
