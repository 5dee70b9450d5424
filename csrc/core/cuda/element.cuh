// Elements on the device: fp32 arithmetic on values stored as float, bf16, half or double. No torch header, no CUDA library.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::cuda {

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_acc(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x);
template <>
__device__ __forceinline__ float from_acc<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_acc<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_acc<bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ float16 from_acc<float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Element i of a parameter array whose dtype is only known at run time; a null pointer reads as 0.
template <class A>
__device__ __forceinline__ A load_param(const void* p, DType dtype, int64_t i) {
  if (p == nullptr) return A(0);
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case DType::kBFloat16:
      return static_cast<A>(to_acc(static_cast<const bfloat16*>(p)[i]));
    case DType::kFloat16:
      return static_cast<A>(to_acc(static_cast<const float16*>(p)[i]));
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(p)[i]);
  }
  return A(0);
}

// The other way, rounded.
template <class A>
__device__ __forceinline__ void store_param(void* p, DType dtype, int64_t i, A x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(x);
      break;
    case DType::kBFloat16:
      static_cast<bfloat16*>(p)[i] = from_acc<bfloat16>(static_cast<float>(x));
      break;
    case DType::kFloat16:
      static_cast<float16*>(p)[i] = from_acc<float16>(static_cast<float>(x));
      break;
    case DType::kFloat64:
      static_cast<double*>(p)[i] = static_cast<double>(x);
      break;
  }
}

__device__ __forceinline__ int64_t load_index(const void* p, bool is_64, int64_t i) {
  return is_64 ? static_cast<const int64_t*>(p)[i] : static_cast<int64_t>(static_cast<const int32_t*>(p)[i]);
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

}  // namespace fastlm::cuda
