// The forward scan of bfloat16.
#include "ops/selective_scan/cuda/forward_launch.cuh"

namespace fastlm::selective_scan::cuda {

template cudaError_t run_forward<bfloat16>(const ForwardCall&, cudaStream_t);

}  // namespace fastlm::selective_scan::cuda
