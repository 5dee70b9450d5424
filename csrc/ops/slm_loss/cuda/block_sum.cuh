// Sums over the threads of a block.
#pragma once

#include "core/cuda/device.cuh"

namespace fastlm::slm_loss::cuda {

struct Sums {
  uint32_t before, total;
};

// Of x over the threads before this one, and over all. `sums`: 32 words of shared memory, free once all threads have passed
// another barrier.
template <int kThreads>
__device__ __forceinline__ Sums block_sums(uint32_t x, uint32_t* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto inclusive = [lane](uint32_t value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = __shfl_up_sync(fastlm::cuda::kFullWarp, value, distance);
      value += lane >= distance ? below : 0;
    }
    return value;
  };
  const uint32_t own = inclusive(x);
  if (lane == 31) sums[warp] = own;
  __syncthreads();
  const uint32_t warps = inclusive(lane < kThreads / 32 ? sums[lane] : 0);
  const uint32_t before = __shfl_sync(fastlm::cuda::kFullWarp, warps, warp > 0 ? warp - 1 : 0);
  return {own - x + (warp > 0 ? before : 0), __shfl_sync(fastlm::cuda::kFullWarp, warps, 31)};
}

}  // namespace fastlm::slm_loss::cuda
