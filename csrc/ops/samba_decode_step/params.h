// What the dense kernels of samba_decode_step see: one token per row of the batch, so every product is a matrix times a few
// vectors. Pointers and strides in elements. T: element type of weights and activations; acc: float, or double for double.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::samba_decode_step {

struct Norm {
  int64_t width;
  const void* hidden;  // (B, width) acc, contiguous
  const void* weight;  // (width,)
  DType weight_dtype;
  int64_t weight_stride;
  double eps;
  void* out;  // (B, width) T, contiguous
};

// y = x weight^T. What happens to y is the kernel's matter: stored as T, added to `hidden`, or gated by a second product.
struct Product {
  int64_t batch, in, out;
  const void* x;  // (B, in) T, unit stride over `in`
  int64_t x_stride;
  const void* weight;  // (out, in) T, unit stride over `in`
  int64_t weight_stride;
  const void* gated;  // a second (out, in) T with a row stride of its own, or null
  int64_t gated_stride;
  void* y;  // (B, out) T, or acc where it is added to; unit stride over `out`
  int64_t y_stride;
};

// A = -exp(A_log), as in training.
struct Decay {
  int64_t dim, state;
  const void* log;  // (D, N)
  DType log_dtype;
  int64_t dim_stride, state_stride;
  void* out;  // (D, N) acc, contiguous
};

}  // namespace fastlm::samba_decode_step
