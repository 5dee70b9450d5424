// Descriptions of tensors in global memory for the tile copies of sm_90a, made on the host and passed to kernels by value.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtypes.h"

#ifndef FASTLM_EMULATE_CUDA
#include <cuda.h>
#endif

namespace fastlm::cuda {

// Up to four dimensions of 16-bit elements, innermost first, and the box that one copy moves. The innermost stride is 1; the
// others are in bytes.
struct TensorShape {
  const void* ptr;
  int64_t size[4];
  int64_t stride[3];  // of dimensions 1 to 3
  int box[4];         // box[0] elements are 128 bytes
};

#ifdef FASTLM_EMULATE_CUDA
struct alignas(64) TensorMap {
  TensorShape shape;
  DType dtype;
};
#else
using TensorMap = CUtensorMap;
#endif

// Whether a tensor can be described: pointer and strides multiples of 16 bytes, no stride of zero, sizes in range.
inline bool has_tensor_map(const TensorShape& t) {
  if (reinterpret_cast<uintptr_t>(t.ptr) % 16 != 0) return false;
  for (const int64_t size : t.size) {
    if (size < 1 || size > int64_t{1} << 31) return false;
  }
  for (const int64_t stride : t.stride) {
    if (stride <= 0 || stride % 16 != 0 || stride >= int64_t{1} << 40) return false;
  }
  return true;
}

// Swizzle of 128 bytes; boxes that reach out of the tensor are filled up with zeros.
cudaError_t make_tensor_map(TensorMap& map, DType dtype, const TensorShape& shape);

}  // namespace fastlm::cuda
