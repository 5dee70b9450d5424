// The backward scan of double.
#include "ops/selective_scan/cuda/backward_launch.cuh"

namespace fastlm::selective_scan::cuda {

template cudaError_t run_backward<double>(const BackwardCall&, cudaStream_t);

}  // namespace fastlm::selective_scan::cuda
