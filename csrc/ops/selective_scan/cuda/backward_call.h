// What the backward kernels on CUDA need beyond the parameters: memory orders, how the work is cut, and memory for partial sums.
#pragma once

#include "ops/selective_scan/cuda/forward_call.h"

namespace fastlm::selective_scan::cuda {

// States that a team holds at a time; N is padded to groups of them.
constexpr int kBackwardStates = 16;
// Positions between two kept states, and those whose sums are formed together.
constexpr int kBackwardSub = 8;
// Two channels a lane (backward_paired.cuh): the channels of a block and the bytes of shared memory it takes.
constexpr int kPairedChannels = 64, kPairedShared = 112 * 1024;

struct BackwardOrders {
  Order u, delta, z, dout, B, C, du, ddelta, dz;
};

// Rows of sums over time, each of D channels: N of dA, then D and the bias, then N of B and N of C where these are constant.
struct ParameterRows {
  int64_t skip, bias, b, c, count;
};

inline ParameterRows parameter_rows(const Params& p) {
  ParameterRows rows{p.state, p.state + 1, p.state + 2, p.state + 2, p.state + 2};
  if (p.B.constant) rows.c += p.state, rows.count += p.state;
  if (p.C.constant) rows.count += p.state;
  return rows;
}

struct BackwardCall {
  BackwardParams p;
  BackwardOrders order;
  // Parts of sequences (see forward_call.h); begin_states: (slots, N, D), the gradient of the state after each part.
  Split split;
  bool ends_only;  // the pass that finds end_states (of the gradient, before a part) and decays
  bool paired;     // two channels a lane
  int64_t slices;  // consecutive slots that one team visits after each other: as many as partial sums are kept of
  ParameterRows parameters;
  int64_t padded_state;  // multiple of kBackwardStates
  void* position_sums;   // (blocks, B L, 2, padded_state): dB and dC over the channels of a block
  void* parameter_sums;  // (slices, parameters.count, D)
  void* carried;  // (slices, blocks, state groups, 4, states of a group and block): what waits for its group's turn, or null
};

// The results that are sums of partial sums.
struct BackwardSums {
  Projection dB, dC;                // per position; data null where constant
  void *dA, *dD, *dbias;            // (D, N), (D,), (D,): accumulation type
  void *dB_constant, *dC_constant;  // (D, N) or null
};

}  // namespace fastlm::selective_scan::cuda
