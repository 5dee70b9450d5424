// The forward scan of float.
#include "ops/selective_scan/cuda/forward_launch.cuh"

namespace fastlm::selective_scan::cuda {

template cudaError_t run_forward<float>(const ForwardCall&, cudaStream_t);

}  // namespace fastlm::selective_scan::cuda
