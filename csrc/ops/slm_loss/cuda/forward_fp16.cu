// The forward pass of float16.
#include "ops/slm_loss/cuda/forward.cuh"

namespace fastlm::slm_loss::cuda {

template cudaError_t run_forward<float16>(const ForwardCall&, cudaStream_t);

}  // namespace fastlm::slm_loss::cuda
