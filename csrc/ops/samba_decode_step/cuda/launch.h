// The step as CUDA launches. Torch-free. Nothing is launched for an empty batch.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/samba_decode_step/cuda/params.h"
#include "ops/sliding_window_attention/cuda/update.h"

namespace fastlm::samba_decode_step::cuda {

// Every phase in order. Where `attn` has counters, in_proj sets them to 0.
struct StepParams {
  Product in_proj, x_proj;
  StateUpdate state;
  Product out_proj, mamba_gate, mamba_down, qkv;
  sliding_window_attention::UpdateParams attn;
  sliding_window_attention::cuda::UpdateWorkspace attn_workspace;
  Product o_proj, attn_gate, attn_down;
  causal_conv1d::UpdateParams conv;
};

// One launch for every phase.
cudaError_t launch_phases(const StepParams& params, DType dtype, cudaStream_t stream);

}  // namespace fastlm::samba_decode_step::cuda
