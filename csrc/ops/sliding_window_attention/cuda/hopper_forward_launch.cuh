// How one width of heads is launched; included by the files that hold an instance.
#pragma once

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/hopper_forward.cuh"
#include "ops/sliding_window_attention/cuda/hopper_forward.h"
#include "ops/sliding_window_attention/cuda/hopper_host.h"

namespace fastlm::sliding_window_attention::cuda {

template <int kD>
cudaError_t run_hopper_forward(const HopperForward& f, DType dtype, cudaStream_t stream) {
  using Shape = HopperShape<kD>;
  const dim3 grid(limited(f.order.count, current_device().num_sms));
  if (dtype == DType::kBFloat16) {
    return launch<hopper_forward<bfloat16, kD>>(grid, Shape::kThreads, ForwardShared<kD>::kBytes, stream, f);
  }
  return launch<hopper_forward<float16, kD>>(grid, Shape::kThreads, ForwardShared<kD>::kBytes, stream, f);
}

}  // namespace fastlm::sliding_window_attention::cuda
