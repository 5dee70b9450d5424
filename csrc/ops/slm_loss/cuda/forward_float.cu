// The forward pass of float and double.
#include "ops/slm_loss/cuda/forward.cuh"

namespace fastlm::slm_loss::cuda {

template cudaError_t run_forward<float>(const ForwardCall&, cudaStream_t);
template cudaError_t run_forward<double>(const ForwardCall&, cudaStream_t);

}  // namespace fastlm::slm_loss::cuda
