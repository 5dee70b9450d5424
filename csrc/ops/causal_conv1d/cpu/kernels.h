// The CPU kernels of causal_conv1d: one table per CPU level, one entry per element type (index: DType).
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d {

// Positions per piece of work in channel-last memory; fixed, so that sums do not depend on the number of threads.
constexpr int64_t kTile = 64;

// weight and bias as (W + 1, D) in the accumulation type, the bias last: what the kernels read instead of `weight`.
using PrepareWeight = void (*)(const Params&, void* prepared);
// Channel-last: items are tiles, numbered through the segments; `tile_begin[s]` is the first tile of segment s.
using ForwardRows = void (*)(const Params&, const void* prepared, const int64_t* tile_begin, int64_t begin, int64_t end);
using BackwardRows = void (*)(const BackwardParams&, const void* prepared, const int64_t* tile_begin, int64_t begin, int64_t end);
// Channel-first: items are (segment, channel) pairs.
using ForwardChannels = void (*)(const Params&, const void* prepared, int64_t begin, int64_t end);
using BackwardChannels = void (*)(const BackwardParams&, const void* prepared, int64_t begin, int64_t end);
// Items are (segment, channel) pairs: fills final_states / adds dfinal_states into dx and fills dinitial_states' tail.
using FinalStates = void (*)(const Params&, int64_t begin, int64_t end);
// Items are channels: sums `pieces` partial results in order into dweight (D, W) and dbias (D,), accumulation type.
using ReducePartial = void (*)(const void* partial, int64_t pieces, int64_t dim, int64_t width, void* dweight, void* dbias,
                               int64_t begin, int64_t end);
using Update = void (*)(const UpdateParams&, int64_t begin, int64_t end);  // items: rows * dim

struct ForwardKernels {
  PrepareWeight prepare_weight[4];
  ForwardRows forward_rows[4];
  ForwardChannels forward_channels[4];
  FinalStates final_states[4];
};

struct BackwardKernels {
  BackwardRows backward_rows[4];
  BackwardChannels backward_channels[4];
  ReducePartial reduce_partial[4];
};

struct UpdateKernels {
  Update update[4];
};

}  // namespace fastlm::causal_conv1d

FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(causal_conv1d::ForwardKernels, causal_conv1d_forward)
FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(causal_conv1d::BackwardKernels, causal_conv1d_backward)
FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(causal_conv1d::UpdateKernels, causal_conv1d_update)
