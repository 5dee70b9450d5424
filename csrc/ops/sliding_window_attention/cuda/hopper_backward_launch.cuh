// How one width of heads is launched; included by the files that hold an instance.
#pragma once

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/hopper_backward.cuh"
#include "ops/sliding_window_attention/cuda/hopper_host.h"

namespace fastlm::sliding_window_attention::cuda {

template <class T, int kD>
cudaError_t run_hopper_backward_of(const HopperBackward& f, cudaStream_t stream) {
  using Shape = BackwardShape<kD>;
  cudaError_t status = launch<hopper_backward_prepare<kD>>(dim3(1), 1024, 0, stream, f);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned int>(f.keys.count));
  constexpr size_t kShared = BackwardShared<kD>::kBytes;
  status = f.p.softcap > 0 ? launch<hopper_backward<T, kD, true>>(grid, Shape::kThreads, kShared, stream, f)
                           : launch<hopper_backward<T, kD, false>>(grid, Shape::kThreads, kShared, stream, f);
  if (status != cudaSuccess) return status;
  return launch<hopper_backward_finish<T, kD>>(dim3(static_cast<unsigned int>(f.queries.count)), 256, 0, stream, f);
}

template <int kD>
cudaError_t run_hopper_backward(const HopperBackward& f, DType dtype, cudaStream_t stream) {
  return dtype == DType::kBFloat16 ? run_hopper_backward_of<bfloat16, kD>(f, stream)
                                   : run_hopper_backward_of<float16, kD>(f, stream);
}

}  // namespace fastlm::sliding_window_attention::cuda
