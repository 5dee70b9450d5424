// The grouped products of one element type; a file for each holds the instances.
#pragma once

#include "core/cuda/gemm/gemm.cuh"
#include "ops/moe_dispatch/cuda/gemm.h"

namespace fastlm::moe_dispatch::cuda {

template <class T>
cudaError_t run_row_product(const fastlm::cuda::gemm::RowProduct& p, fastlm::cuda::gemm::Layout b, void* out,
                            cudaStream_t stream) {
  using fastlm::cuda::gemm::Layout;
  const fastlm::cuda::gemm::Store<T> store{{out, p.n, 0}};
  const auto backend = fastlm::cuda::gemm::row_backend(p, DTypeOf<T>::value, b, 1);
  return b == Layout::kDepth ? fastlm::cuda::gemm::row_product<T, Layout::kDepth>(backend, p, store, stream)
                             : fastlm::cuda::gemm::row_product<T, Layout::kWidth>(backend, p, store, stream);
}

template <class T>
cudaError_t run_outer_product(const fastlm::cuda::gemm::OuterProduct& p, void* out, cudaStream_t stream) {
  const fastlm::cuda::gemm::Store<T> store{{out, p.n, p.m * p.n}};
  return fastlm::cuda::gemm::outer_product<T>(fastlm::cuda::gemm::outer_backend(p, DTypeOf<T>::value), p, store, stream);
}

}  // namespace fastlm::moe_dispatch::cuda
