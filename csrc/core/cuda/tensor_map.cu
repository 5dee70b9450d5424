// Tensor maps from the driver, whose library is never linked: its entry point comes from the runtime.
#include "core/cuda/tensor_map.h"

namespace fastlm::cuda {

#ifdef FASTLM_EMULATE_CUDA

cudaError_t make_tensor_map(TensorMap& map, DType dtype, const TensorShape& shape) {
  const bool sound = has_tensor_map(shape) && shape.box[0] == 64 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16);
  if (!sound) return cudaErrorInvalidValue;
  for (const int n : shape.box) {
    if (n < 1 || n > 256) return cudaErrorInvalidValue;
  }
  map = {shape, dtype};
  return cudaSuccess;
}

#else

cudaError_t make_tensor_map(TensorMap& map, DType dtype, const TensorShape& shape) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(shape.size[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
  }
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(shape.stride[i]);
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto describe = [&] {
    return encode(&map, type, 4, const_cast<void*>(shape.ptr), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = describe();
  if (result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_NOT_INITIALIZED) {
    // A thread that has launched nothing yet (autograd's, at the start of a backward pass) has no current context: the runtime
    // makes one when it needs it, the driver does not.
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    result = describe();
  }
  if (result == CUDA_SUCCESS) return cudaSuccess;
  return result == CUDA_ERROR_INVALID_CONTEXT ? cudaErrorDeviceUninitialized : cudaErrorInvalidValue;
}

#endif

}  // namespace fastlm::cuda
