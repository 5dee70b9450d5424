// The CPU kernels of selective_scan: one table per CPU level, one entry per element type (index: DType), and how work is cut.
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan {

constexpr int64_t kStateGroup = 4;     // states that are walked through time together; N is padded to a multiple
constexpr int64_t kChannelAlign = 16;  // no vector has more lanes; channels of a group are padded to a multiple

// How work is cut. Depends on the shapes alone, so sums over blocks come out the same for every number of threads.
struct Plan {
  int64_t group_dim;         // channels per group, D / G
  int64_t padded_dim;        // the same, padded
  int64_t padded_state;      // N, padded
  int64_t block;             // channels per block, a multiple of kChannelAlign
  int64_t blocks_per_group;  // ceil(group_dim / block)
  int64_t num_blocks;        // over all groups
};

// Arrays per channel in the accumulation type, in one buffer; each entry is an offset in elements. Channels are counted
// c = group * padded_dim + channel within the group; padding is 0. Arrays of (channel, state) pairs lie in vectors of channels:
// pair (c, n) is element (c / lanes * padded_state + n) * lanes + c % lanes.
struct ChannelArrays {
  int64_t decay;  // (C, N): A * log2(e); as a gradient: dA
  int64_t bound;  // (C): |dt| up to here keeps exp2(dt * decay) in the range where it needs no clamping
  int64_t bias;   // (C)
  int64_t skip;   // (C): the parameter D
  int64_t b, c;   // (C, N): constant B and C
  int64_t total;  // elements
};

struct BackwardWork {
  const int64_t* slice_begin;  // first sequence of each slice, and the number of sequences at the end
  int64_t num_slices;
  void* position_partial;  // (num_blocks, B * L, 2, padded_state): dB and dC summed over the channels of a block
  void* channel_partial;   // (num_slices, ChannelArrays::total): gradients of parameters
};

// Items: kChannelAlign padded channels each.
using PrepareKernel = void (*)(const Params&, const Plan&, const ChannelArrays&, void* prepared, int64_t begin, int64_t end);
// Items: (sequence, block) pairs.
using ForwardKernel = void (*)(const ForwardParams&, const Plan&, const ChannelArrays&, const void* prepared, int64_t begin,
                               int64_t end);
// Items: (slice, block) pairs.
using Backward = void (*)(const BackwardParams&, const Plan&, const ChannelArrays&, const void* prepared, const BackwardWork&,
                          int64_t begin, int64_t end);
// Items: positions, B * L: sums the blocks of each group in order into dB or dC (which: 0 or 1).
using ReducePositions = void (*)(const BackwardParams&, const Plan&, const BackwardWork&, int which, const Projection& grad,
                                 int64_t begin, int64_t end);
// Items: channels: sums the slices in order into a (D, N) gradient (states = N) or a (D,) one (states = 0), accumulation type.
using ReduceChannels = void (*)(const BackwardParams&, const Plan&, const ChannelArrays&, const BackwardWork&, int64_t array,
                                int64_t states, void* grad, int64_t begin, int64_t end);
using Update = void (*)(const UpdateParams&, int64_t begin, int64_t end);  // items: (row, block of kUpdateBlock channels)

constexpr int64_t kUpdateBlock = 64;

struct ForwardKernels {
  PrepareKernel prepare[4];
  ForwardKernel forward[4];
};

struct BackwardKernels {
  Backward backward[4];
  ReducePositions reduce_positions[4];
  ReduceChannels reduce_channels[4];
};

struct UpdateKernels {
  Update update[4];
};

}  // namespace fastlm::selective_scan

FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(selective_scan::ForwardKernels, selective_scan_forward)
FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(selective_scan::BackwardKernels, selective_scan_backward)
FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(selective_scan::UpdateKernels, selective_scan_update)
