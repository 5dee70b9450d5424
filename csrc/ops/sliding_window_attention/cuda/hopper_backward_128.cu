// The sm_90a backward kernels for heads of up to 128.
#include "ops/sliding_window_attention/cuda/hopper_host.h"

#ifdef FASTLM_HOPPER_KERNELS
#include "ops/sliding_window_attention/cuda/hopper_backward_launch.cuh"

namespace fastlm::sliding_window_attention::cuda {

template cudaError_t run_hopper_backward<128>(const HopperBackward&, DType, cudaStream_t);

}  // namespace fastlm::sliding_window_attention::cuda
#endif
