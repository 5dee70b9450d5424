// Products by the backend that was chosen; included by the .cu files that hold instances. A file for each epilogue and 16-bit
// type keeps compile times short.
#pragma once

#include "core/cuda/gemm/fma.cuh"
#include "core/cuda/gemm/gemm.h"
#include "core/cuda/gemm/hopper_host.h"
#include "core/cuda/gemm/mma.cuh"
#include "core/cuda/gemm/stream.cuh"

#ifdef FASTLM_HOPPER_KERNELS
#include "core/cuda/gemm/hopper.cuh"
#endif

namespace fastlm::cuda::gemm {

// `backend` is what row_backend said of this product, with this `streams`.
template <class T, Layout kB, bool kStreams = true, class Epilogue>
cudaError_t row_product(Backend backend, const RowProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
#ifdef FASTLM_HOPPER_KERNELS
  if constexpr (sizeof(T) == 2) {
    if (backend == Backend::kHopper) return hopper_row_product<T, kB>(p, epilogue, stream);
  }
#endif
  (void)backend;
  if constexpr (sizeof(T) == 2) {
    if constexpr (kStreams) {
      if (backend == Backend::kStream) return stream_row_product<T, kB>(p, epilogue, stream);
    }
    return mma_row_product<T, kB>(p, epilogue, stream);
  } else {
    return fma_row_product<T, kB>(p, epilogue, stream);
  }
}

template <class T, class Epilogue>
cudaError_t outer_product(Backend backend, const OuterProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
#ifdef FASTLM_HOPPER_KERNELS
  if constexpr (sizeof(T) == 2) {
    if (backend == Backend::kHopper) return hopper_outer_product<T>(p, epilogue, stream);
  }
#endif
  (void)backend;
  if constexpr (sizeof(T) == 2) {
    return mma_outer_product<T>(p, epilogue, stream);
  } else {
    return fma_outer_product<T>(p, epilogue, stream);
  }
}

}  // namespace fastlm::cuda::gemm
