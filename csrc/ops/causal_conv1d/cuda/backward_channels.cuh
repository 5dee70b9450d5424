// Depthwise causal convolution on CUDA, backward, along time (see lines.cuh). A thread computes dp at its own kSteps positions
// and at the W-1 after them: (16 + W - 1) / 16 of the arithmetic. The threads of a line add their weight gradients by exchanges
// and through shared memory, always in the same order. Bound by DRAM.
#pragma once

#include "ops/causal_conv1d/cuda/backward.cuh"
#include "ops/causal_conv1d/cuda/lines.cuh"

namespace fastlm::causal_conv1d::cuda {

// kSteps positions of one channel; they, the W-1 before and the W-1 after them lie in one segment.
template <class T, int kWidth, class Sums>
__device__ __forceinline__ void backward_line(const BackwardParams& p, int64_t batch, int64_t channel, int64_t t0, bool vectors,
                                              Sums& dw) {
  using A = acc_t<T>;
  constexpr int kKeep = kWidth - 1;
  A in[kSteps + 2 * kKeep], g[kSteps + kKeep];
  load_line<T, kKeep, kKeep>(static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel * p.x_dim_stride + t0, vectors, in);
  load_line<T, 0, kKeep>(static_cast<const T*>(p.dout) + batch * p.dout_batch_stride + channel * p.dout_dim_stride + t0, vectors,
                         g);
  Filter<A, kWidth, 1, kChannelThreads> filter;
  filter.load(p, kWidth, channel);
#pragma unroll
  for (int i = 0; i < kSteps + kKeep; ++i) {
    A sum = filter.bias[0];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = multiply_add(filter.weight(j, 0), in[i + j], sum);
    g[i] = before_activation(g[i], sum, p.silu);
    if (i < kSteps) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) dw(j, 0) = multiply_add(g[i], in[i + j], dw(j, 0));
      dw(kWidth, 0) += g[i];
    }
  }
  A out[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    A sum = A(0);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = multiply_add(filter.weight(j, 0), g[i + kKeep - j], sum);
    out[i] = sum;
  }
  store_line<T>(static_cast<T*>(p.dx) + batch * p.dx_batch_stride + channel * p.dx_dim_stride + t0, vectors, out);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kChannelThreads) backward_channels(const BackwardParams p, const Tiling tiling) {
  using A = acc_t<T>;
  if (blockIdx.x >= tiling.tiles) {
    return initial_state_grad<T>(p, tiling.num_states,
                                 static_cast<int64_t>(blockIdx.x - tiling.tiles) * kChannelThreads + threadIdx.x);
  }
  const LinePlace at = line_place(tiling);
  Registers<A, kWidth + 1, 1> dw;
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) dw(j, 0) = A(0);
  if (at.channel < p.dim && at.t0 < p.seqlen) {
    const Bounds s = bounds_at(p, at.batch, at.t0, at.t0 + kSteps + kWidth - 1);
    if (at.t0 - (kWidth - 1) >= s.begin && at.t0 + kSteps + kWidth - 1 <= s.end && !s.padding) {
      backward_line<T, kWidth>(p, at.batch, at.channel, at.t0, tiling.vectors, dw);
    } else {
      backward_piece<T, kWidth, 1, kChannelThreads>(p, kWidth, dw, at.batch, at.channel, at.t0, min(at.t0 + kSteps, p.seqlen));
    }
  }

  const int thread = static_cast<int>(threadIdx.x);
  const int per_line = static_cast<int>(tiling.threads_per_line);
  const int per_warp = min(per_line, 32);
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const A other = __shfl_xor_sync(fastlm::cuda::kFullWarp, dw(j, 0), distance);
      if (distance < per_warp) dw(j, 0) += other;
    }
  }
  A* sums = reinterpret_cast<A*>(fastlm::cuda::shared_memory());  // [j][part of a line]
  if (thread % per_warp == 0) {
#pragma unroll
    for (int j = 0; j <= kWidth; ++j) sums[j * kChannelThreads + thread / per_warp] = dw(j, 0);
  }
  __syncthreads();
  if (thread % per_line != 0 || at.channel >= p.dim) return;
  A* partial = static_cast<A*>(p.partial) + static_cast<int64_t>(at.piece) * (kWidth + 1) * p.dim + at.channel;
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) {
    A sum = A(0);
    for (int part = 0; part < per_line / per_warp; ++part) sum += sums[j * kChannelThreads + thread / per_warp + part];
    partial[j * p.dim] = sum;
  }
}

}  // namespace fastlm::causal_conv1d::cuda
