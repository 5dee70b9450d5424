// Launches of backward.cuh for one element type; included by the files that hold its instances.
#pragma once

#include "core/cuda/launch.h"
#include "ops/selective_scan/cuda/backward.cuh"
#include "ops/selective_scan/cuda/backward_ends.cuh"
#include "ops/selective_scan/cuda/backward_launch.h"
#include "ops/selective_scan/cuda/backward_paired.cuh"

namespace fastlm::selective_scan::cuda {

template <class Shape>
cudaError_t start_backward(const BackwardCall& call, cudaStream_t stream) {
  const int64_t items = call.slices * Shape::blocks(call.p);
  if (items > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return fastlm::cuda::launch<backward_kernel<Shape>>(dim3(static_cast<unsigned int>(items)), Shape::kThreads,
                                                      Shape::kSharedBytes, stream, call);
}

template <class T>
cudaError_t run_backward(const BackwardCall& call, cudaStream_t stream) {
  if (call.ends_only) {
    using Shape = EndsShape<T>;
    const int64_t items = call.split.slots * Shape::blocks(call.p);
    if (items > 0x7fffffff) return cudaErrorInvalidConfiguration;
    return fastlm::cuda::launch<backward_ends_kernel<T>>(dim3(static_cast<unsigned int>(items)), Shape::kThreads,
                                                         Shape::kSharedBytes, stream, call);
  }
  if constexpr (sizeof(T) != 8) {
    if (call.p.state <= kBackwardStates && !call.p.B.constant && !call.p.C.constant) {
      if constexpr (sizeof(T) == 2) {
        if (call.paired) {
          using Shape = PairedShape<T>;
          const int64_t items = call.slices * Shape::blocks(call.p);
          if (items > 0x7fffffff) return cudaErrorInvalidConfiguration;
          return fastlm::cuda::launch<backward_paired_kernel<T>>(dim3(static_cast<unsigned int>(items)), Shape::kThreads,
                                                                 Shape::kSharedBytes, stream, call);
        }
      }
      return start_backward<BackwardShape<T, false, true>>(call, stream);
    }
  }
  return start_backward<BackwardShape<T, true, false>>(call, stream);
}

}  // namespace fastlm::selective_scan::cuda
