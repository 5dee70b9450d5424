// Activations of an expert, with their derivatives, as cpu/activation.h has them. Two families, whose members differ by numbers
// only: an epilogue is compiled for each of the two, and silu costs one multiply-add more than alone. With kFast, for results in
// 16 bits, exponentials and reciprocals are those of the special-function unit.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/moe_dispatch/params.h"

namespace fastlm::moe_dispatch::cuda {

template <bool kFast, class A>
__device__ __forceinline__ A logistic(A x) {
  if constexpr (kFast) {
    return fastlm::cuda::rcp_approx(1.0f + fastlm::cuda::exp2_approx(-1.4426950408889634f * x));
  } else {
    return fastlm::cuda::sigmoid(x);
  }
}

// x sigmoid(x (linear + cubic x^2)): silu, and gelu_tanh, since x / 2 (1 + tanh(y)) = x sigmoid(2 y), where nothing cancels.
template <bool kFast, class A>
struct Sigmoidal {
  A linear, cubic;

  // The bound keeps 0 times infinity out; sigmoid is 0 or 1 long before.
  static __device__ __forceinline__ A square(A x) {
    const A y = x * x;
    return y < A(1e30) ? y : A(1e30);
  }
  __device__ __forceinline__ A value(A x) const {
    return x * logistic<kFast>(x * fastlm::cuda::multiply_add(cubic, square(x), linear));
  }
  __device__ __forceinline__ void both(A x, A& value, A& slope) const {
    const A y = square(x);
    const A s = logistic<kFast>(x * fastlm::cuda::multiply_add(cubic, y, linear));
    value = x * s;
    slope = s + value * (1 - s) * fastlm::cuda::multiply_add(3 * cubic, y, linear);
  }
};

// max(x, 0), or its square. NaN stays NaN, and the slope at 0 is 0.
template <class A>
struct Rectified {
  bool squared;

  __device__ __forceinline__ A value(A x) const {
    const A y = x < 0 ? A(0) : x;
    return squared ? y * y : y;
  }
  __device__ __forceinline__ void both(A x, A& value, A& slope) const {
    const A y = x < 0 ? A(0) : x;
    value = squared ? y * y : y;
    slope = squared ? 2 * y : x > 0 ? A(1) : A(0);
  }
};

// use(f) with the activation.
template <bool kFast, class A, class Use>
__device__ __forceinline__ void with_activation(Activation activation, const Use& use) {
  if (activation == Activation::kRelu || activation == Activation::kRelu2) {
    use(Rectified<A>{activation == Activation::kRelu2});
  } else {
    constexpr A kTwice = A(2 * 0.7978845608028654);  // sqrt(2 / pi)
    const bool silu = activation == Activation::kSilu;
    use(Sigmoidal<kFast, A>{silu ? A(1) : kTwice, silu ? A(0) : kTwice * A(0.044715)});
  }
}

}  // namespace fastlm::moe_dispatch::cuda
