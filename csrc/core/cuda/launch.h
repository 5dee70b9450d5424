// How kernels are started, and what the device can do. Included by .cu files and, for `Device`, by adapters; no torch header.
//
//   return launch<forward<T, 16>>(grid, kThreads, shared_bytes, stream, params);
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace fastlm::cuda {

struct Device {
  int major, minor;      // compute capability
  int num_sms;           // multiprocessors
  int max_shared_bytes;  // of dynamic shared memory a block may ask for
};

// The current device, asked once.
const Device& current_device();

inline unsigned int limited(int64_t n, int64_t limit) { return static_cast<unsigned int>(n < limit ? n : limit); }

#ifdef FASTLM_EMULATE_CUDA
}  // namespace fastlm::cuda
#include "core/cuda/emulation/run.h"
namespace fastlm::cuda {

template <auto kKernel, class... A>
cudaError_t launch(dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t, const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  emulation::run_grid(grid, threads, shared_bytes, 1, [&] { kKernel(args...); });
  return cudaSuccess;
}
template <auto kKernel, class... A>
cudaError_t launch_cooperative(dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t, const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  emulation::run_grid(grid, threads, shared_bytes, 0, [&] { kKernel(args...); });
  return cudaSuccess;
}
template <auto kKernel, class... A>
cudaError_t launch_clusters(unsigned int blocks, dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t,
                            const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  emulation::run_grid(grid, threads, shared_bytes, blocks, [&] { kKernel(args...); });
  return cudaSuccess;
}
template <auto kKernel>
int blocks_per_sm(unsigned int, size_t) {
  return 1;
}

#elif defined(__CUDACC__)

// Lets `kernel` use more than 48 KiB of shared memory where it asks for it; once for each device.
template <auto kKernel>
cudaError_t allow_shared(size_t shared_bytes) {
  static std::atomic<size_t> allowed[64];
  static std::mutex raising;  // the attribute is set, not raised: a smaller size must not come second
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  std::atomic<size_t>& so_far = allowed[device % 64];
  if (shared_bytes <= so_far.load(std::memory_order_acquire)) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(raising);
  if (shared_bytes <= so_far.load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) so_far.store(shared_bytes, std::memory_order_release);
  return status;
}

namespace detail {

template <auto kKernel, class Start, class... A>
cudaError_t start(Start start_kernel, size_t shared_bytes, const A&... args) {
  if (const cudaError_t status = allow_shared<kKernel>(shared_bytes); status != cudaSuccess) return status;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  const cudaError_t status = start_kernel(reinterpret_cast<const void*>(kKernel), pointers);
  if (status != cudaSuccess) cudaGetLastError();  // reported by the caller; not a second time by the next launch
  return status;
}

}  // namespace detail

// Starts kKernel with these arguments, whose types are exactly those of its parameters.
template <auto kKernel, class... A>
cudaError_t launch(dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t stream, const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  const auto start = [&](const void* kernel, void** pointers) {
    return cudaLaunchKernel(kernel, grid, dim3(threads), pointers, shared_bytes, stream);
  };
  return detail::start<kKernel>(start, shared_bytes, args...);
}

// All blocks at once on the device, so that they may wait for each other; the grid must fit (blocks_per_sm).
template <auto kKernel, class... A>
cudaError_t launch_cooperative(dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t stream, const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  const auto start = [&](const void* kernel, void** pointers) {
    return cudaLaunchCooperativeKernel(kernel, grid, dim3(threads), pointers, shared_bytes, stream);
  };
  return detail::start<kKernel>(start, shared_bytes, args...);
}

// Clusters of `blocks` blocks along x, a divisor of the grid's.
template <auto kKernel, class... A>
cudaError_t launch_clusters(unsigned int blocks, dim3 grid, unsigned int threads, size_t shared_bytes, cudaStream_t stream,
                            const A&... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(A...)>, "arguments must have the types of the parameters");
  const auto start = [&](const void* kernel, void** pointers) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = blocks;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, kernel, pointers);
  };
  return detail::start<kKernel>(start, shared_bytes, args...);
}

template <auto kKernel>
int blocks_per_sm(unsigned int threads, size_t shared_bytes) {
  int blocks = 0;
  if (allow_shared<kKernel>(shared_bytes) != cudaSuccess) return 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kKernel), static_cast<int>(threads),
                                                shared_bytes);
  return blocks;
}
#endif

}  // namespace fastlm::cuda
