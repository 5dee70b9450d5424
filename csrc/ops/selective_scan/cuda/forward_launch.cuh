// Launches of forward.cuh for one element type; included by the files that hold its instances.
#pragma once

#include "core/cuda/launch.h"
#include "ops/selective_scan/cuda/forward.cuh"
#include "ops/selective_scan/cuda/forward_teams.cuh"
#include "ops/selective_scan/cuda/launch.h"

namespace fastlm::selective_scan::cuda {

// Tiles under way: two beside the one at work where they are small.
template <class T>
constexpr int kForwardStages = sizeof(T) == 2   ? 3
                               : sizeof(T) == 4 ? 2
                                                : 1;

template <class T>
using ForwardSmall = ForwardShape<T, 4, 4, 32, kForwardStages<T>>;  // N up to 16
template <class T>
using ForwardMiddle = ForwardShape<T, 16, 4, 16, sizeof(T) == 8 ? 1 : 2>;  // 64
template <class T>
using ForwardLarge = ForwardShape<T, 32, 8, 8, sizeof(T) == 8 ? 1 : 2>;  // 256

template <class Shape, bool kEnds>
cudaError_t start_forward(const ForwardCall& call, cudaStream_t stream) {
  const int64_t items = call.split.slots * Shape::blocks(call.p);
  if (items == 0) return cudaSuccess;
  return fastlm::cuda::launch<forward_kernel<Shape, kEnds>>(dim3(fastlm::cuda::limited(items, 0x7fffffff)), Shape::kThreads,
                                                            Shape::kSharedBytes, stream, call, items);
}

// The two-team form, for what most calls are.
template <class T>
cudaError_t start_teams(const ForwardCall& call, cudaStream_t stream) {
  using Shape = TeamsShape<T>;
  const int64_t items = call.split.slots * Shape::blocks(call.p);
  if (items == 0) return cudaSuccess;
  return fastlm::cuda::launch<forward_teams_kernel<Shape>>(dim3(fastlm::cuda::limited(items, 0x7fffffff)), Shape::kBlockThreads,
                                                           Shape::kSharedBytes, stream, call, items);
}

template <class T>
cudaError_t run_forward(const ForwardCall& call, cudaStream_t stream) {
  if (call.ends_only) return start_forward<ForwardSmall<T>, true>(call, stream);
  if constexpr (sizeof(T) <= 4) {
    const bool plain = !call.p.B.constant && !call.p.C.constant && call.p.all_states == nullptr;
    if (plain && call.p.state <= TeamsShape<T>::kStates) return start_teams<T>(call, stream);
  }
  if (call.p.state <= ForwardSmall<T>::kStates) return start_forward<ForwardSmall<T>, false>(call, stream);
  if (call.p.state <= ForwardMiddle<T>::kStates) return start_forward<ForwardMiddle<T>, false>(call, stream);
  return start_forward<ForwardLarge<T>, false>(call, stream);
}

}  // namespace fastlm::selective_scan::cuda
