// The gradient of an expert's activation, with everything that follows from it row by row as the epilogue of the product that
// makes it.
#pragma once

#include "core/cuda/gemm/gemm.cuh"
#include "ops/moe_dispatch/cuda/activation.cuh"
#include "ops/moe_dispatch/cuda/experts.h"
#include "ops/moe_dispatch/cuda/pieces.cuh"

namespace fastlm::moe_dispatch::cuda {

template <class T, bool kGated>
struct GateBackwardEpilogue {
  static constexpr int kParts = 1;
  const T* gate_up;  // (R, n), with a gate (R, 2 n); a lane reads no element that another one writes, if dgate_up is the same
  const acc_t<T>* weight;  // (R,)
  T* dgate_up;             // like gate_up, or null
  T* weighted_act;         // (R, n) or null
  acc_t<T>* shares;        // (slabs of n, rows) or null
  int64_t rows;
  Activation activation;
  bool wide;  // pieces of all of them lie on 16 bytes

  template <int kCount, class A>
  __device__ __forceinline__ void operator()(const Slab& slab, A (&d)[kCount]) const {
    with_activation<sizeof(T) == 2, A>(activation, [&](const auto& f) { apply(slab, d, f); });
  }

  template <class F, int kCount, class A>
  __device__ __forceinline__ void apply(const Slab& slab, const A (&d)[kCount], const F& f) const {
    using P = Pieces<kCount>;
    const int64_t n = slab.columns, width = kGated ? 2 * n : n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = slab.row_of(i);
      const bool valid = row < slab.row_end;
      const A w = valid ? weight[row] : A(0);
      A share = A(0);
#pragma unroll
      for (int q = 0; q < P::kNumber; ++q) {
        const int64_t column = slab.column + q * P::kColumns;
        if (column >= n) continue;
        const PieceLine<T> line{n - column, slab.lane, valid, wide};
        const int64_t at = row * width + column;
        A gate[P::kValues], up[P::kValues], act[P::kValues];
        line.load(gate_up + at, gate);
        if constexpr (kGated) line.load(gate_up + at + n, up);
#pragma unroll
        for (int v = 0; v < P::kValues; ++v) {
          A value, slope;
          f.both(gate[v], value, slope);
          const A da = line.has(v) ? d[P::place(i, q, v)] : A(0), weighted = da * w;
          A full = value;
          if constexpr (kGated) {
            full *= up[v];
            gate[v] = weighted * up[v] * slope;
            up[v] = weighted * value;
          } else {
            gate[v] = weighted * slope;
          }
          share += da * full;
          act[v] = full * w;
        }
        if (dgate_up != nullptr) {
          line.store(dgate_up + at, gate);
          if constexpr (kGated) line.store(dgate_up + at + n, up);
        }
        if (weighted_act != nullptr) line.store(weighted_act + row * n + column, act);
      }
      if (shares == nullptr) continue;
      share = gemm::quad_sum(share);
      if (valid && slab.lane % 4 == 0) shares[slab.column / (2 * kCount) * rows + row] = share;
    }
  }
};

template <class T, bool kGated>
cudaError_t start_gate_backward(const GateBackwardCall& call, cudaStream_t stream) {
  const ExpertProduct& of = call.of;
  const bool wide =
      of.product.n % 8 == 0 && aligned_16(call.gate_up) && aligned_16(call.dgate_up) && aligned_16(call.weighted_act);
  const GateBackwardEpilogue<T, kGated> epilogue{static_cast<const T*>(call.gate_up),
                                                 static_cast<const acc_t<T>*>(call.weight),
                                                 static_cast<T*>(call.dgate_up),
                                                 static_cast<T*>(call.weighted_act),
                                                 static_cast<acc_t<T>*>(call.shares),
                                                 of.product.rows.rows,
                                                 call.activation,
                                                 wide};
  return of.layout == gemm::Layout::kDepth ? gemm::row_product<T, gemm::Layout::kDepth>(of.backend, of.product, epilogue, stream)
                                           : gemm::row_product<T, gemm::Layout::kWidth>(of.backend, of.product, epilogue, stream);
}

template <class T>
cudaError_t gate_backward_of(const GateBackwardCall& call, cudaStream_t stream) {
  return call.gated ? start_gate_backward<T, true>(call, stream) : start_gate_backward<T, false>(call, stream);
}

}  // namespace fastlm::moe_dispatch::cuda
