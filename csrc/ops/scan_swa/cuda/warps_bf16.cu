// The fused launch of bfloat16 on warps.
#include "ops/scan_swa/cuda/warps.cuh"

namespace fastlm::scan_swa::cuda {

template int warps_shared_bytes<bfloat16>(int64_t);
template cudaError_t launch_warps<bfloat16>(const scan::ForwardCall&, const sliding_window_attention::Params&, cudaStream_t);

}  // namespace fastlm::scan_swa::cuda
