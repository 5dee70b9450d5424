// The fused launch of a scan and an attention on CUDA. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/selective_scan/cuda/forward_call.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::scan_swa::cuda {

constexpr int kMostHopperHead = 128;

// Whether one launch holds both: 16-bit elements of one type, up to 16 states, heads up to 256 wide (sm_90a: 128), shared memory
// for both (where a block has 99 KiB: heads up to 64), and a scan whose time the operator itself would not split. Everything else
// runs as the two operators' own launches, one after the other.
bool fuses(const selective_scan::ForwardParams& scan, DType scan_dtype, const sliding_window_attention::Params& attention,
           DType attention_dtype);

cudaError_t launch_fused(const selective_scan::cuda::ForwardCall& scan, const sliding_window_attention::Params& attention,
                         DType dtype, cudaStream_t stream);

// The two ways, by what the attention alone would take.
template <class T>
int warps_shared_bytes(int64_t head_dim);
template <class T>
cudaError_t launch_warps(const selective_scan::cuda::ForwardCall& scan, const sliding_window_attention::Params& attention,
                         cudaStream_t stream);
template <class T>
cudaError_t launch_hopper(const selective_scan::cuda::ForwardCall& scan, const sliding_window_attention::Params& attention,
                          cudaStream_t stream);

}  // namespace fastlm::scan_swa::cuda
