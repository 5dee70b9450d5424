// Launches of the stable order of picks by expert on CUDA. Torch-free; device pointers, no value of which the host reads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fastlm::moe_dispatch::cuda {

// Slot s is pick s % top_k of token s / top_k. An id outside of [0, experts) is no expert: its slot comes behind all experts.
struct PlanCall {
  const void* ids;  // (slots / top_k, top_k), int32 or int64
  bool ids_64;
  int64_t token_stride, pick_stride;
  int64_t slots, experts, top_k;
  int32_t* offsets;  // (experts + 1,)
  int32_t* perm;     // (slots,), row -> slot
  int32_t* inv;      // (slots,), slot -> row
  int32_t* tokens;   // (slots,), row -> token, or null
  void* workspace;   // plan_workspace bytes, aligned to 4
};

size_t plan_workspace(int64_t slots, int64_t experts);

// offsets, perm and inv, and tokens where it is asked for. One to three launches, beyond 1364 experts up to ten.
cudaError_t launch_plan(const PlanCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
