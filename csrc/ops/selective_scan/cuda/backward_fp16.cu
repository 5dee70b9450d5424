// The backward scan of float16.
#include "ops/selective_scan/cuda/backward_launch.cuh"

namespace fastlm::selective_scan::cuda {

template cudaError_t run_backward<float16>(const BackwardCall&, cudaStream_t);

}  // namespace fastlm::selective_scan::cuda
