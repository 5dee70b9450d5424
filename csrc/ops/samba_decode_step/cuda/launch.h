// The step as CUDA launches. Torch-free. Nothing is launched for an empty batch.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/samba_decode_step/cuda/params.h"
#include "ops/sliding_window_attention/cuda/update.h"

namespace fastlm::samba_decode_step::cuda {

// The products in order. kSteps belongs to the state update; the attention stands before kOProj.
enum ProductIndex { kInProj, kXProj, kSteps, kOutProj, kMambaGate, kMambaDown, kQkv, kOProj, kAttnGate, kAttnDown, kNumProducts };

struct StepParams {
  Product products[kNumProducts];
  StateUpdate state;
  causal_conv1d::UpdateParams conv;
  sliding_window_attention::UpdateParams attn;
  sliding_window_attention::cuda::UpdateWorkspace attn_workspace;  // in_proj sets its counters to 0
};

// One launch for every phase: eleven, and one more for each norm whose tokens are too wide for shared memory.
cudaError_t launch_phases(const StepParams& params, DType dtype, cudaStream_t stream);

// One launch for all of them, whose blocks wait for each other between the phases. `counter`: memory for the barrier. The same
// bits.
bool whole_applies(const StepParams& params, DType dtype);
cudaError_t launch_whole(const StepParams& params, int32_t* counter, DType dtype, cudaStream_t stream);

}  // namespace fastlm::samba_decode_step::cuda
