// The backward pass of bfloat16.
#include "ops/slm_loss/cuda/backward.cuh"

namespace fastlm::slm_loss::cuda {

template cudaError_t run_backward<bfloat16>(const BackwardCall&, cudaStream_t);

}  // namespace fastlm::slm_loss::cuda
