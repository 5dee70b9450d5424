// The backward pass of float and double.
#include "ops/slm_loss/cuda/backward.cuh"

namespace fastlm::slm_loss::cuda {

template cudaError_t run_backward<float>(const BackwardCall&, cudaStream_t);
template cudaError_t run_backward<double>(const BackwardCall&, cudaStream_t);

}  // namespace fastlm::slm_loss::cuda
