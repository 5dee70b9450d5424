// CUDA device code compiled as host C++, so that the arithmetic and the index maths of a kernel can be tested where there is no
// GPU. Included before a .cuh by tests/build/*.cpp. One thread at a time runs, so kernels that synchronise are called piece by
// piece.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __device__
#define __global__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

static thread_local dim3 blockIdx, threadIdx, gridDim, blockDim;
static inline void __syncthreads() {}
static inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <class A, class B>
static inline int64_t min(A a, B b) {
  return std::min<int64_t>(a, b);
}

namespace fastlm::cuda {

// Runs `kernel` once for every thread of the grid.
template <class Kernel>
void for_each_thread(dim3 grid, unsigned int threads, Kernel kernel) {
  gridDim = grid;
  blockDim = dim3(threads, 1, 1);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
      }
    }
  }
}

}  // namespace fastlm::cuda
