// float and 16-bit instances of generic.cuh.
#include "ops/sliding_window_attention/cuda/generic_launch.cuh"

namespace fastlm::sliding_window_attention::cuda {

template cudaError_t launch_generic<float, 128>(const BackwardParams& p, bool backward, cudaStream_t stream);
template cudaError_t launch_generic<float, 512>(const BackwardParams& p, bool backward, cudaStream_t stream);
template cudaError_t launch_generic<bfloat16, 512>(const BackwardParams& p, bool backward, cudaStream_t stream);
template cudaError_t launch_generic<float16, 512>(const BackwardParams& p, bool backward, cudaStream_t stream);

}  // namespace fastlm::sliding_window_attention::cuda
