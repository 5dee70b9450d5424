// Products of sorted rows that end in rows: the second one of an expert, with its bias, and the gradient of the hidden states.
// And the gradients of the weights.
#pragma once

#include "core/cuda/gemm/gemm.cuh"
#include "ops/moe_dispatch/cuda/experts.h"

namespace fastlm::moe_dispatch::cuda {

template <class T>
struct BiasStore {
  static constexpr int kParts = 1;
  gemm::Output out;
  const acc_t<T>* bias;  // (E, n) or null

  template <int kCount, class A>
  __device__ __forceinline__ void operator()(const gemm::Slab& slab, A (&d)[kCount]) const {
    if (bias != nullptr) gemm::add_to_columns(slab, bias + slab.group * slab.columns, d);
    gemm::store_slab<T, kCount>(slab, out, d);
  }
};

template <class T>
cudaError_t down_of(const DownCall& call, cudaStream_t stream) {
  const ExpertProduct& of = call.of;
  // Groups' rows follow each other in one matrix.
  const BiasStore<T> epilogue{{call.out, of.product.n, 0}, static_cast<const acc_t<T>*>(call.bias)};
  return of.layout == gemm::Layout::kDepth ? gemm::row_product<T, gemm::Layout::kDepth>(of.backend, of.product, epilogue, stream)
                                           : gemm::row_product<T, gemm::Layout::kWidth>(of.backend, of.product, epilogue, stream);
}

template <class T>
cudaError_t outer_of(const OuterCall& call, cudaStream_t stream) {
  const gemm::OuterProduct& p = call.product;
  return gemm::outer_product<T>(call.backend, p, gemm::Store<T>{{call.out, p.n, p.m * p.n}}, stream);
}

}  // namespace fastlm::moe_dispatch::cuda
