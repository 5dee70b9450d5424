// The fused launch of bfloat16 on sm_90a.
#include "ops/sliding_window_attention/cuda/hopper_host.h"

#ifdef FASTLM_HOPPER_KERNELS
#include "ops/scan_swa/cuda/hopper.cuh"

namespace fastlm::scan_swa::cuda {

template cudaError_t launch_hopper<bfloat16>(const scan::ForwardCall&, const sliding_window_attention::Params&, cudaStream_t);

}  // namespace fastlm::scan_swa::cuda

#else
#include "ops/scan_swa/cuda/launch.h"

namespace fastlm::scan_swa::cuda {

template <>
cudaError_t launch_hopper<bfloat16>(const selective_scan::cuda::ForwardCall&, const sliding_window_attention::Params&,
                                    cudaStream_t) {
  return cudaErrorNotSupported;  // hopper_forward_applies to nothing in this build
}

}  // namespace fastlm::scan_swa::cuda
#endif
