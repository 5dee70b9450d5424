// Logits in the registers of an epilogue, as both passes begin with.
#pragma once

#include "core/cuda/gemm/slab.cuh"
#include "ops/slm_loss/cuda/nll.h"

namespace fastlm::slm_loss::cuda {

// e^x for x <= 0 (NaN stays): of float a relative error of a few 1e-7.
__device__ __forceinline__ float exponential(float x) { return fastlm::cuda::exp2_approx(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// tanh. 16-bit elements: 1e-7 absolute, in six instructions; a logit is then as good as its sum.
template <class T>
__device__ __forceinline__ acc_t<T> bounded(acc_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    return 1.0f - 2.0f * fastlm::cuda::rcp_approx(1.0f + fastlm::cuda::exp2_approx(x * 2.8853900817779268f));
  } else {
    return tanh(x);
  }
}

// The larger one; a NaN gives way to the other.
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

// x, but no less than -1000, so that 0 times it is 0. NaN stays.
template <class A>
__device__ __forceinline__ A kept_finite(A x) {
  return x < A(-1000) ? A(-1000) : x;
}

// What makes logits of sums.
template <class T>
struct Logits {
  using A = acc_t<T>;
  const A* bias;         // of the first word of the product, or null
  A softcap, inverse;    // 0: none
  const int32_t* label;  // of the wave's rows
  int64_t first_word;    // number of the first word of the product

  Logits() = default;
  Logits(const Head& head, const Wave& wave, int64_t word)
      : bias(head.bias == nullptr ? nullptr : static_cast<const A*>(head.bias) + word),
        softcap(static_cast<A>(head.softcap)),
        inverse(head.softcap > 0 ? static_cast<A>(1 / head.softcap) : A(0)),
        label(wave.label),
        first_word(word) {}

  // Sums become logits; those beyond the last word -inf.
  template <int kCount>
  __device__ __forceinline__ void apply(const fastlm::cuda::gemm::Slab& slab, A (&d)[kCount]) const {
    const bool whole = slab.column + 2 * kCount <= slab.columns;
    if (bias != nullptr) fastlm::cuda::gemm::add_to_columns(slab, bias, d);
    if (softcap > A(0)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = softcap * bounded<T>(d[i] * inverse);
    }
    if (whole) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (slab.column_of(i / 4) + i % 2 >= slab.columns) d[i] = minus_infinity<A>();
    }
  }

  // The column of the row's label, counted from this lane's first one; negative or 2 kCount and more: not in the slab.
  template <int kCount>
  __device__ __forceinline__ int label_column(const fastlm::cuda::gemm::Slab& slab, int64_t row) const {
    const int64_t column = label[row] - first_word - slab.column_of(0);
    return column < 0 || column >= 2 * kCount ? -1 : static_cast<int>(column);
  }
};

// The product hidden x weight^T of a wave with `words` words from `word` on.
inline fastlm::cuda::gemm::RowProduct logits_product(const Head& head, const Chosen& chosen, const Wave& wave, int64_t first,
                                                     int64_t word, int64_t words, int64_t element_bytes) {
  fastlm::cuda::gemm::RowProduct p{};
  p.rows = {nullptr, false, 1, wave.rows, chosen.count, first};
  p.n = words;
  p.k = head.hidden_size;
  p.a = {wave.hidden, wave.stride, 0, nullptr, wave.rows};
  p.b = {static_cast<const char*>(head.weight) + word * head.weight_row_stride * element_bytes, head.weight_row_stride, 0,
         nullptr, words};
  return p;
}

}  // namespace fastlm::slm_loss::cuda
