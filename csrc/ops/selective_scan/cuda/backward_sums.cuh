// Sums of the backward scan's partial sums, in a fixed order: dB and dC over blocks of channels, parameters over slices. Bound by
// DRAM: 8 N bytes for each block of channels and position.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/selective_scan/cuda/backward_call.h"
#include "ops/selective_scan/cuda/sequences.cuh"

namespace fastlm::selective_scan::cuda {

// One thread for four states of dB or dC at a position.
template <class T>
__global__ void __launch_bounds__(256)
    position_sums_kernel(const __grid_constant__ BackwardCall call, const __grid_constant__ BackwardSums to, int64_t blocks) {
  using A = acc_t<T>;
  const Params& p = call.p;
  const int64_t positions = p.batch * p.seqlen, row = 2 * call.padded_state, quads = row / 4;
  const A* sums = static_cast<const A*>(call.position_sums);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < positions * quads;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t position = item / quads, column = item % quads * 4;
    const bool second = column >= call.padded_state;
    const int64_t n = column - (second ? call.padded_state : 0);
    const Projection& grad = second ? to.dC : to.dB;
    if (grad.data == nullptr || n >= p.state) continue;
    const int64_t per_group = blocks / grad.groups;
    for (int64_t group = 0; group < grad.groups; ++group) {
      const A* from = sums + (group * per_group * positions + position) * row + column;
      A sum[4] = {};
#pragma unroll 8
      for (int64_t block = 0; block < per_group; ++block, from += positions * row) {
        if constexpr (sizeof(A) == 4) {
          const float4 x = *reinterpret_cast<const float4*>(from);
          sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += from[i];
        }
      }
      T* out = static_cast<T*>(const_cast<void*>(grad.data)) + position / p.seqlen * grad.batch_stride +
               position % p.seqlen * grad.seq_stride + group * grad.group_stride + n * grad.state_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i < p.state) out[i * grad.state_stride] = fastlm::cuda::from_acc<T>(sum[i]);
      }
    }
  }
}

// One thread for each parameter.
template <class A>
__global__ void __launch_bounds__(256)
    parameter_sums_kernel(const __grid_constant__ BackwardCall call, const __grid_constant__ BackwardSums to) {
  const Params& p = call.p;
  const ParameterRows& rows = call.parameters;
  const int64_t total = rows.count * p.dim;
  const A* sums = static_cast<const A*>(call.parameter_sums);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    A sum = A(0);
    for (int64_t slice = 0; slice < call.slices; ++slice) sum += sums[slice * total + item];
    const int64_t row = item / p.dim, d = item % p.dim;
    if (row < p.state) {
      static_cast<A*>(to.dA)[d * p.state + row] = sum;
    } else if (row == rows.skip) {
      static_cast<A*>(to.dD)[d] = sum;
    } else if (row == rows.bias) {
      static_cast<A*>(to.dbias)[d] = sum;
    } else if (p.B.constant && row < rows.b + p.state) {
      static_cast<A*>(to.dB_constant)[d * p.state + row - rows.b] = sum;
    } else {
      static_cast<A*>(to.dC_constant)[d * p.state + row - rows.c] = sum;
    }
  }
}

// Gradients of the states after the parts of split sequences, from the last part to the first. One thread for each (sequence,
// state, channel).
template <class A>
__global__ void __launch_bounds__(256) carry_back_kernel(const __grid_constant__ BackwardCall call, A* begin_states) {
  const BackwardParams& p = call.p;
  const int64_t total = p.num_sequences * p.state * p.dim;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t d = item % p.dim, n = item / p.dim % p.state, s = item / p.dim / p.state;
    const Sequence sequence = sequence_of(p, s);
    const int64_t parts = num_parts(call.split, sequence);
    A carry = p.dlast_state == nullptr ? A(0) : static_cast<const A*>(p.dlast_state)[(s * p.dim + d) * p.state + n];
    int64_t at = ((first_slot(p, call.split, s, sequence) + parts - 1) * p.state + n) * p.dim + d;
    for (int64_t i = parts; i > 0; --i, at -= p.state * p.dim) {
      begin_states[at] = carry;
      carry = fastlm::cuda::multiply_add(static_cast<const A*>(call.split.decays)[at], carry,
                                         static_cast<const A*>(call.split.end_states)[at]);
    }
  }
}

}  // namespace fastlm::selective_scan::cuda
