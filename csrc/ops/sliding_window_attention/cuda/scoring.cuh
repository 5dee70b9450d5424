// How scores leave the product q . k: s = unit * raw. Where that is not all (softcap, a scale that is not positive), the raw
// products are first replaced by scores in natural units.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

template <class A>
struct Scoring {
  bool transform;
  A scale;  // of raw scores, inside of tanh: over softcap
  A softcap, inverse_cap;
  A unit;       // of what `apply` leaves
  A log2_unit;  // the same for powers of 2
  A gradient_scale;

  // On the host, so that kernels find these among their parameters.
  explicit Scoring(const Params& p) {
    softcap = static_cast<A>(p.softcap);
    transform = p.softcap > 0 || !(p.softmax_scale > 0);
    inverse_cap = p.softcap > 0 ? static_cast<A>(1.0 / p.softcap) : A(0);
    scale = static_cast<A>(p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale);
    unit = transform ? A(1) : static_cast<A>(p.softmax_scale);
    log2_unit = static_cast<A>((transform ? 1.0 : p.softmax_scale) * 1.4426950408889634074);
    gradient_scale = static_cast<A>(p.softmax_scale);
  }

  __device__ __forceinline__ A apply(A raw) const {
    if (softcap > A(0)) return tanh(raw * scale) * softcap;
    return raw * scale;
  }
  // The same with an error of 2^-22 or so of softcap, without a branch.
  __device__ __forceinline__ A apply_approx(A raw) const {
    if (softcap > A(0)) {
      const float power = fastlm::cuda::exp2_approx(raw * scale * 2.8853900817779268f);  // e^(2 x)
      return softcap - 2.0f * softcap * fastlm::cuda::rcp_approx(1.0f + power);
    }
    return raw * scale;
  }
  // d apply / d raw, over softmax_scale.
  __device__ __forceinline__ A slope(A score) const {
    const A t = score * inverse_cap;
    return A(1) - t * t;
  }
};

}  // namespace fastlm::sliding_window_attention::cuda
