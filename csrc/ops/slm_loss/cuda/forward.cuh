// The forward pass of the head: a product whose logits never leave registers. A slab of words leaves the maximum and two sums of
// each token; finishing them is the work of rows.cu.
#pragma once

#include "core/cuda/gemm/gemm.cuh"
#include "ops/slm_loss/cuda/logits.cuh"

namespace fastlm::slm_loss::cuda {

template <class T, bool kEntropy>
struct Statistics {
  using A = acc_t<T>;
  static constexpr int kParts = 1;
  Logits<T> logits;
  int64_t rows;
  A* slab_max;
  A* slab_sum;
  A* slab_weighted;
  A* label_logit;

  template <int kCount>
  __device__ __forceinline__ void operator()(const fastlm::cuda::gemm::Slab& slab, A (&d)[kCount]) const {
    using fastlm::cuda::gemm::quad_max;
    using fastlm::cuda::gemm::quad_sum;
    logits.apply(slab, d);
    const int64_t at = slab.column / (2 * kCount) * rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = slab.row_of(i);
      A top = minus_infinity<A>();
#pragma unroll
      for (int n = 0; n < kCount / 2; ++n) {
        top = larger(top, d[n / 2 * 4 + 2 * i + n % 2]);
      }
      top = quad_max(top);
      const A reference = top == minus_infinity<A>() ? A(0) : top;
      A sum = 0, weighted = 0;
#pragma unroll
      for (int n = 0; n < kCount / 2; ++n) {
        const A t = d[n / 2 * 4 + 2 * i + n % 2] - reference;
        const A e = exponential(t);
        sum += e;
        if constexpr (kEntropy) weighted = fastlm::cuda::multiply_add(e, kept_finite(t), weighted);
      }
      sum = quad_sum(sum);
      if constexpr (kEntropy) weighted = quad_sum(weighted);
      if (row >= slab.row_end) continue;
      if (slab.lane % 4 == 0) {
        slab_max[at + row] = top;
        slab_sum[at + row] = sum;
        if constexpr (kEntropy) slab_weighted[at + row] = weighted;
      }
      const int label = logits.template label_column<kCount>(slab, row);
      if (label < 0 || label % 8 > 1) continue;
#pragma unroll
      for (int n = 0; n < kCount / 2; ++n) {
        if (label == n / 2 * 8 + n % 2) label_logit[row] = d[n / 2 * 4 + 2 * i + n % 2];
      }
    }
  }
};

template <class T, bool kEntropy>
cudaError_t run_forward_as(const ForwardCall& c, cudaStream_t stream) {
  using A = acc_t<T>;
  constexpr DType kType = DTypeOf<T>::value;
  const Statistics<T, kEntropy> epilogue{{c.head, c.wave, 0},
                                         c.wave.rows,
                                         static_cast<A*>(c.slab_max),
                                         static_cast<A*>(c.slab_sum),
                                         static_cast<A*>(c.slab_weighted),
                                         static_cast<A*>(c.label_logit)};
  for (int64_t first = 0; first < c.head.tokens; first += c.wave.rows) {
    cudaError_t status = launch_gather(c.head, nullptr, c.chosen, c.wave, first, nullptr, nullptr, kType, stream);
    if (status != cudaSuccess) return status;
    const auto product = logits_product(c.head, c.chosen, c.wave, first, 0, c.head.vocab, sizeof(T));
    status =
        fastlm::cuda::gemm::row_product<T, fastlm::cuda::gemm::Layout::kDepth, false>(c.plan.backend, product, epilogue, stream);
    if (status != cudaSuccess) return status;
    if (status = launch_finish(c, first, kType, stream); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t run_forward(const ForwardCall& c, cudaStream_t stream) {
  return c.entropy != nullptr ? run_forward_as<T, true>(c, stream) : run_forward_as<T, false>(c, stream);
}

}  // namespace fastlm::slm_loss::cuda
