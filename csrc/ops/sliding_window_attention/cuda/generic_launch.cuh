// Launches of generic.cuh for one element type; included by the files that hold its instances.
#pragma once

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/generic.cuh"
#include "ops/sliding_window_attention/cuda/launch.h"

namespace fastlm::sliding_window_attention::cuda {

template <class T, int kDim, Pass kPass>
cudaError_t launch_pass(const BackwardParams& p, cudaStream_t stream) {
  using Shape = GenericShape<T, kDim>;
  const Scoring<acc_t<T>> score(p);
  const int64_t items = Shape::items(p, kPass == Pass::kKeys || kPass == Pass::kValues);
  return for_all_items(items, [&](dim3 grid, int64_t first) {
    return fastlm::cuda::launch<generic<T, kDim, kPass>>(grid, Shape::kThreads, Shape::kSharedBytes, stream, p, score, first);
  });
}

// The forward pass (of which only Params are looked at), or dq, dk and dv.
template <class T, int kDim>
cudaError_t launch_generic(const BackwardParams& p, bool backward, cudaStream_t stream) {
  if (!backward) return launch_pass<T, kDim, Pass::kForward>(p, stream);
  if (const cudaError_t status = launch_pass<T, kDim, Pass::kQueries>(p, stream); status != cudaSuccess) return status;
  if (const cudaError_t status = launch_pass<T, kDim, Pass::kKeys>(p, stream); status != cudaSuccess) return status;
  return launch_pass<T, kDim, Pass::kValues>(p, stream);
}

}  // namespace fastlm::sliding_window_attention::cuda
