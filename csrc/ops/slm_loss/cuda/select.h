// The choice of the tokens with the largest scores: what the kernel sees, and its launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::slm_loss::cuda {

struct SelectParams {
  const void* score;       // (T,) contiguous, T < 2^31
  const bool* allowed;     // (T,) contiguous
  int64_t total;           // T
  bool vectors;            // scores, flags and mask are aligned to groups of 4 tokens
  const void* cu_seqlens;  // (segments + 1,) contiguous, or null: one segment
  bool cu_seqlens_64;
  int64_t segments;
  double keep_ratio;
  bool random_ties;
  uint64_t mixed_seed;  // mix_bits(seed)

  bool* mask;       // (T,)
  void* threshold;  // (segments,) float, or double for double
  int64_t* counts;  // (segments, 3)
  void* workspace;  // SelectPlan::workspace_bytes
};

// How a call is cut: `blocks` blocks of `threads` threads for each segment, each keeping up to `capacity` keys in shared memory.
struct SelectPlan {
  int32_t blocks, threads;
  int32_t capacity;
  int64_t workspace_bytes;
};

SelectPlan plan_select(int64_t total, int64_t segments, DType dtype, bool random_ties);
cudaError_t launch_select(const SelectParams& p, const SelectPlan& plan, DType dtype, cudaStream_t stream);

}  // namespace fastlm::slm_loss::cuda
