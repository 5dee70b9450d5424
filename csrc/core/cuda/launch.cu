// What the device can do, asked once per device.
#include "core/cuda/launch.h"

#include <mutex>

namespace fastlm::cuda {

#ifndef FASTLM_EMULATE_CUDA
const Device& current_device() {
  static Device devices[64];
  static std::once_flag asked[64];
  int index = 0;
  cudaGetDevice(&index);
  index %= 64;
  std::call_once(asked[index], [index] {
    Device& d = devices[index];
    cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&d.minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&d.num_sms, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&d.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  });
  return devices[index];
}
#endif

}  // namespace fastlm::cuda
