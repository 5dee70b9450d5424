// Activations of an expert, with their derivatives, as cpu/activation.h has them. With kFast, for results in 16 bits,
// exponentials and reciprocals are those of the special-function unit.
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

template <bool kFast>
struct Silu {
  template <class A>
  static __device__ __forceinline__ A value(A x) {
    return x * logistic<kFast>(x);
  }
  template <class A>
  static __device__ __forceinline__ void both(A x, A& value, A& slope) {
    const A s = logistic<kFast>(x);
    value = x * s;
    slope = s * (1 + x * (1 - s));
  }
};

// x / 2 (1 + tanh(y)) = x sigmoid(2 y) with y = sqrt(2 / pi) (x + 0.044715 x^3): nothing cancels where tanh is near -1.
template <bool kFast>
struct GeluTanh {
  template <class A>
  static __device__ __forceinline__ A share(A x) {
    return logistic<kFast>(A(2 * 0.7978845608028654) * (x + A(0.044715) * x * x * x));
  }
  template <class A>
  static __device__ __forceinline__ A value(A x) {
    return x * share(x);
  }
  template <class A>
  static __device__ __forceinline__ void both(A x, A& value, A& slope) {
    const A s = share(x);
    value = x * s;
    slope = s + value * (1 - s) * (A(2 * 0.7978845608028654) * (1 + A(3 * 0.044715) * x * x));
  }
};

// max(x, 0); NaN stays NaN, and the slope at 0 is 0.
struct Relu {
  template <class A>
  static __device__ __forceinline__ A value(A x) {
    return x < 0 ? A(0) : x;
  }
  template <class A>
  static __device__ __forceinline__ void both(A x, A& out, A& slope) {
    out = value(x);
    slope = x > 0 ? A(1) : A(0);
  }
};

// max(x, 0)^2.
struct Relu2 {
  template <class A>
  static __device__ __forceinline__ A value(A x) {
    const A y = Relu::value(x);
    return y * y;
  }
  template <class A>
  static __device__ __forceinline__ void both(A x, A& out, A& slope) {
    const A y = Relu::value(x);
    out = y * y;
    slope = 2 * y;
  }
};

}  // namespace fastlm::moe_dispatch::cuda
