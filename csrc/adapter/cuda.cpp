// torch's streams and CUDA's errors, for the CUDA twins.
#include "adapter/cuda.h"

#include <stdexcept>
#include <string>

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
  throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + cudaGetErrorString(status));
}

}  // namespace fastlm
