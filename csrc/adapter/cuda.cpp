// torch's streams and CUDA's errors, for the CUDA twins.
#include "adapter/cuda.h"

#include <stdexcept>
#include <string>

#include "adapter/check.h"
#include "core/cuda/launch.h"

namespace fastlm {

#ifdef FASTLM_EMULATE_CUDA
cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

void check_launch(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    const cuda::Device& device = cuda::current_device();
    const std::string number = std::to_string(device.major) + std::to_string(device.minor);
    const std::string wanted = number == "90" ? "90a" : number;  // with the kernels that only those devices have
    throw std::runtime_error(
        join_text(op, ": this build of fastlm has kernels for sm_", FASTLM_CUDA_ARCHITECTURES, " and the device is sm_", number,
                  device.major < 8 ? "; the operators need compute capability 8.0 or later"
                                   : "; install it again with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=" + wanted));
  }
  throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + cudaGetErrorString(status));
}

}  // namespace fastlm
