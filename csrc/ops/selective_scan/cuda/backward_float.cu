// The backward scan of float.
#include "ops/selective_scan/cuda/backward_launch.cuh"

namespace fastlm::selective_scan::cuda {

template cudaError_t run_backward<float>(const BackwardCall&, cudaStream_t);

}  // namespace fastlm::selective_scan::cuda
