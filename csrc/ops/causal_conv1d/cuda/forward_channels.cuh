// Depthwise causal convolution on CUDA, forward, along time (see lines.cuh). Bound by DRAM.
#pragma once

#include "ops/causal_conv1d/cuda/forward.cuh"
#include "ops/causal_conv1d/cuda/lines.cuh"

namespace fastlm::causal_conv1d::cuda {

// kSteps positions of one channel, all of them and the W-1 before them in one segment.
template <class T, int kWidth>
__device__ __forceinline__ void forward_line(const Params& p, int64_t batch, int64_t channel, int64_t t0, bool vectors) {
  using A = acc_t<T>;
  const int64_t x = batch * p.x_batch_stride + channel * p.x_dim_stride + t0;
  A in[kWidth - 1 + kSteps];
  load_line<T, kWidth - 1, 0>(static_cast<const T*>(p.x) + x, vectors, in);
  Filter<A, kWidth, 1, kChannelThreads> filter;
  filter.load(p, kWidth, channel);
  A out[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    A sum = filter.bias[0];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = multiply_add(filter.weight(j, 0), in[i + j], sum);
    out[i] = activate(sum, p.silu);
  }
  store_line<T>(static_cast<T*>(p.out) + batch * p.out_batch_stride + channel * p.out_dim_stride + t0, vectors, out);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kChannelThreads) forward_channels(const Params p, const Tiling tiling) {
  if (blockIdx.x >= tiling.tiles) {
    return final_state<T>(p, tiling.num_states, static_cast<int64_t>(blockIdx.x - tiling.tiles) * kChannelThreads + threadIdx.x);
  }
  const LinePlace at = line_place(tiling);
  if (at.channel >= p.dim || at.t0 >= p.seqlen) return;
  const Bounds s = bounds_at(p, at.batch, at.t0, at.t0 + kSteps);
  if (at.t0 - (kWidth - 1) >= s.begin && at.t0 + kSteps <= s.end && !s.padding) {
    forward_line<T, kWidth>(p, at.batch, at.channel, at.t0, tiling.vectors);
  } else {
    forward_piece<T, kWidth, 1, kChannelThreads>(p, at.batch, at.channel, at.t0, min(at.t0 + kSteps, p.seqlen));
  }
}

}  // namespace fastlm::causal_conv1d::cuda
