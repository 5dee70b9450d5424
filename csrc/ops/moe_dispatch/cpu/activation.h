// Activations of an expert, with their derivatives. Per-level code.
#pragma once

#include "core/simd/simd.h"
#include "ops/moe_dispatch/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

struct Silu {
  template <class V>
  static FASTLM_INLINE V value(V x) {
    return silu(x);
  }
  template <class V>
  static FASTLM_INLINE void both(V x, V& value, V& slope) {
    const V s = sigmoid(x);
    value = x * s;
    slope = s * (1 + x * (1 - s));
  }
};

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
struct GeluTanh {
  template <class V>
  static FASTLM_INLINE V inner_tanh(V x) {
    using A = typename ScalarOf<V>::type;
    return tanh(A(0.7978845608028654) * (x + A(0.044715) * x * x * x));
  }
  template <class V>
  static FASTLM_INLINE V value(V x) {
    using A = typename ScalarOf<V>::type;
    return A(0.5) * x * (1 + inner_tanh(x));
  }
  template <class V>
  static FASTLM_INLINE void both(V x, V& value, V& slope) {
    using A = typename ScalarOf<V>::type;
    const V t = inner_tanh(x);
    const V inner_slope = A(0.7978845608028654) * (1 + A(3 * 0.044715) * x * x);
    value = A(0.5) * x * (1 + t);
    slope = A(0.5) * (1 + t) + A(0.5) * x * (1 - t * t) * inner_slope;
  }
};

// max(x, 0); NaN stays NaN, and the slope at 0 is 0.
struct Relu {
  template <class V>
  static FASTLM_INLINE V value(V x) {
    return x < 0 ? V{} : x;
  }
  template <class V>
  static FASTLM_INLINE void both(V x, V& out, V& slope) {
    out = value(x);
    slope = x > 0 ? V{} + 1 : V{};
  }
};

// max(x, 0)^2.
struct Relu2 {
  template <class V>
  static FASTLM_INLINE V value(V x) {
    const V y = Relu::value(x);
    return y * y;
  }
  template <class V>
  static FASTLM_INLINE void both(V x, V& out, V& slope) {
    const V y = Relu::value(x);
    out = y * y;
    slope = 2 * y;
  }
};

// Calls use.template operator()<Activation>().
template <class Use>
FASTLM_INLINE void with_activation(moe_dispatch::Activation activation, const Use& use) {
  switch (activation) {
    case moe_dispatch::Activation::kSilu:
      return use.template operator()<Silu>();
    case moe_dispatch::Activation::kGeluTanh:
      return use.template operator()<GeluTanh>();
    case moe_dispatch::Activation::kRelu:
      return use.template operator()<Relu>();
    case moe_dispatch::Activation::kRelu2:
      return use.template operator()<Relu2>();
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
