// bfloat16 instances of forward.cuh.
#include "ops/sliding_window_attention/cuda/forward_launch.cuh"

namespace fastlm::sliding_window_attention::cuda {

template cudaError_t launch_forward_dims<bfloat16>(const Params& p, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
