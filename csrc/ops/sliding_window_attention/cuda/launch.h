// Launches of the CUDA kernels of sliding_window_attention. Torch-free. Nothing is launched for empty problems; `device` of the
// parameters must be filled, `sequences` is not looked at.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

cudaError_t launch_forward(const Params& params, DType dtype, cudaStream_t stream);

// Bytes of device memory the backward pass works in beside row_delta, 256-byte aligned; may be 0.
size_t backward_workspace_bytes(const BackwardParams& params, DType dtype);
// Fills row_delta, dq, dk and dv.
cudaError_t launch_backward(const BackwardParams& params, void* workspace, DType dtype, cudaStream_t stream);

// Calls start(blocks, first item) until a block was started for each of `items` pieces of work: once, for all that fits memory.
template <class F>
cudaError_t for_all_items(int64_t items, F&& start) {
  constexpr int64_t kMost = 0x7fffffff;
  for (int64_t first = 0; first < items; first += kMost) {
    const int64_t blocks = items - first < kMost ? items - first : kMost;
    if (const cudaError_t status = start(dim3(static_cast<unsigned int>(blocks)), first); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// ---- the parts ------------------------------------------------------------------------------------------------------------

// row_delta: sum over K of dout * out, minus dlse; the first step of every backward pass.
cudaError_t launch_row_delta(const BackwardParams& params, DType dtype, cudaStream_t stream);

// Whether pointers and strides allow copies of 16 bytes.
bool vectors_apply(const Params& params, DType dtype);
bool vectors_apply(const BackwardParams& params, DType dtype);

// bfloat16 and float16, head dims up to 256: matrix products of a warp (mma.cuh).
cudaError_t launch_forward_mma(const Params& params, DType dtype, cudaStream_t stream);
cudaError_t launch_backward_mma(const BackwardParams& params, DType dtype, cudaStream_t stream);
// Everything else: fused multiply-adds (generic.cuh).
cudaError_t launch_forward_generic(const Params& params, DType dtype, cudaStream_t stream);
cudaError_t launch_backward_generic(const BackwardParams& params, DType dtype, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
