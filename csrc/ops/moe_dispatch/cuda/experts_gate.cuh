// The first product of an expert with its activation as the epilogue.
#pragma once

#include "core/cuda/gemm/gemm.cuh"
#include "ops/moe_dispatch/cuda/activation.cuh"
#include "ops/moe_dispatch/cuda/experts.h"
#include "ops/moe_dispatch/cuda/pieces.cuh"

namespace fastlm::moe_dispatch::cuda {

template <class T, bool kGated>
struct GateEpilogue {
  static constexpr int kParts = kGated ? 2 : 1;
  T* act;                // (R, n) or null
  T* gate_up;            // (R, kParts n) or null
  const acc_t<T>* bias;  // (E, kParts n) or null
  Activation activation;
  bool wide;  // pieces of both lie on 16 bytes

  template <int kCount, class A>
  __device__ __forceinline__ void operator()(const Slab& slab, A (&d)[kCount]) const {
    with_activation<sizeof(T) == 2, A>(activation, [&](const auto& f) { apply(slab, d, f); });
  }

  template <class F, int kCount, class A>
  __device__ __forceinline__ void apply(const Slab& slab, const A (&d)[kCount], const F& f) const {
    constexpr int kPart = kCount / kParts;
    using P = Pieces<kPart>;
    const int64_t n = slab.columns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = slab.row_of(i);
#pragma unroll
      for (int q = 0; q < P::kNumber; ++q) {
        const int64_t column = slab.column + q * P::kColumns;
        if (column >= n) continue;
        const PieceLine<T> line{n - column, slab.lane, row < slab.row_end, wide};
        A first[P::kValues], up[P::kValues];  // what f is of; the other factor
#pragma unroll
        for (int v = 0; v < P::kValues; ++v) {
          first[v] = d[P::place(i, q, v)];
          if constexpr (kGated) up[v] = d[kPart + P::place(i, q, v)];
        }
        if (bias != nullptr) {
          const A* const from = bias + slab.group * kParts * n + column;
          line.add(from, first);
          if constexpr (kGated) line.add(from + n, up);
        }
        if (gate_up != nullptr) {
          T* const to = gate_up + row * kParts * n + column;
          line.store(to, first);
          if constexpr (kGated) line.store(to + n, up);
        }
        if (act == nullptr) continue;
#pragma unroll
        for (int v = 0; v < P::kValues; ++v) {
          first[v] = f.value(first[v]);
          if constexpr (kGated) first[v] *= up[v];
        }
        line.store(act + row * n + column, first);
      }
    }
  }
};

template <class T, bool kGated>
cudaError_t start_gate(const GateCall& call, cudaStream_t stream) {
  const ExpertProduct& of = call.of;
  const GateEpilogue<T, kGated> epilogue{static_cast<T*>(call.act), static_cast<T*>(call.gate_up),
                                         static_cast<const acc_t<T>*>(call.bias), call.activation,
                                         of.product.n % 8 == 0 && aligned_16(call.act) && aligned_16(call.gate_up)};
  return of.layout == gemm::Layout::kDepth ? gemm::row_product<T, gemm::Layout::kDepth>(of.backend, of.product, epilogue, stream)
                                           : gemm::row_product<T, gemm::Layout::kWidth>(of.backend, of.product, epilogue, stream);
}

template <class T>
cudaError_t gate_of(const GateCall& call, cudaStream_t stream) {
  return call.gated ? start_gate<T, true>(call, stream) : start_gate<T, false>(call, stream);
}

}  // namespace fastlm::moe_dispatch::cuda
