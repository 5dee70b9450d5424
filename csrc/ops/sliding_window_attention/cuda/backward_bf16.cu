// bfloat16 instances of backward.cuh.
#include "ops/sliding_window_attention/cuda/backward_launch.cuh"

namespace fastlm::sliding_window_attention::cuda {

template cudaError_t launch_backward_dims<bfloat16>(const BackwardParams& p, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
