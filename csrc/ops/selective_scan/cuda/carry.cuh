// The states before the parts of split sequences: S_0 is the initial state, S_{i+1} = decays_i S_i + end_i. One thread for each
// (sequence, state, channel); bound by DRAM, (3 N D) numbers for each part.
#pragma once

#include "ops/selective_scan/cuda/sequences.cuh"

namespace fastlm::selective_scan::cuda {

template <class A>
__global__ void __launch_bounds__(256) carry_kernel(const __grid_constant__ ForwardCall call, A* begin_states) {
  const ForwardParams& p = call.p;
  const int64_t total = p.num_sequences * p.state * p.dim;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t d = item % p.dim, n = item / p.dim % p.state, s = item / p.dim / p.state;
    const Sequence sequence = sequence_of(p, s);
    A state = fastlm::cuda::load_param<A>(p.initial_state, p.initial_dtype,
                                          s * p.initial_batch_stride + d * p.initial_dim_stride + n * p.initial_state_stride);
    int64_t at = (first_slot(p, call.split, s, sequence) * p.state + n) * p.dim + d;
    for (int64_t i = num_parts(call.split, sequence); i > 0; --i, at += p.state * p.dim) {
      begin_states[at] = state;
      state = fastlm::cuda::multiply_add(static_cast<const A*>(call.split.decays)[at], state,
                                         static_cast<const A*>(call.split.end_states)[at]);
    }
  }
}

}  // namespace fastlm::selective_scan::cuda
