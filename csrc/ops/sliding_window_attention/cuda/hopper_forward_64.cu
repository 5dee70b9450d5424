// The sm_90a forward kernels for heads of up to 64.
#include "ops/sliding_window_attention/cuda/hopper_host.h"

#ifdef FASTLM_HOPPER_KERNELS
#include "ops/sliding_window_attention/cuda/hopper_forward_launch.cuh"

namespace fastlm::sliding_window_attention::cuda {

template cudaError_t run_hopper_forward<64>(const HopperForward&, DType, cudaStream_t);

}  // namespace fastlm::sliding_window_attention::cuda
#endif
