// Depthwise causal convolution on CUDA, forward: p_t = b + sum_j w_j x_{t-(W-1)+j}, out_t = p_t or SiLU(p_t); and the final
// states. Bound by DRAM: every input is read once (and the W-1 before a piece once more, from L2) and every output written once.
//
// A thread carries the window of its channels (16 bytes of a row where memory is aligned, else one channel) along a piece of
// time. A result has the same bits whichever way it is computed, here or in forward_channels.cuh.
#pragma once

#include "ops/causal_conv1d/cuda/segments.cuh"
#include "ops/causal_conv1d/cuda/tiling.h"

namespace fastlm::causal_conv1d::cuda {

// Positions [begin, end) of segment s, `channel` being the thread's first one.
template <class T, int kWidth, int kLanes, class FilterT, class Window>
__device__ __forceinline__ void forward_run(const Params& p, int width, FilterT& filter, Window& tap, const Bounds& s,
                                            int64_t batch, int64_t channel, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel * p.x_dim_stride + begin * p.x_seq_stride;
  T* out = static_cast<T*>(p.out) + batch * p.out_batch_stride + channel * p.out_dim_stride + begin * p.out_seq_stride;
  Elements<T, kLanes> result;
  if (s.padding) {
    A zero[kLanes] = {};
    result.set(zero);
    for (int64_t t = begin; t < end; ++t, out += p.out_seq_stride) result.store(out);
    return;
  }
  start_window<T, kLanes>(p, width, s, batch, channel, begin, tap);
  const auto step = [&](const Elements<T, kLanes>& in) {
    A y[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      tap(width - 1, i) = in.get(i);
      A sum = filter.bias[i];
#pragma unroll
      for (int j = 0; j < width; ++j) sum = multiply_add(filter.weight(j, i), tap(j, i), sum);
      y[i] = activate(sum, p.silu);
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) tap(j, i) = tap(j + 1, i);
    }
    result.set(y);
    result.store(out);
    out += p.out_seq_stride;
  };
  for (int64_t left = end - begin; left > 0; left -= kUnroll) {
    Elements<T, kLanes> in[kUnroll];
    if (left >= kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) in[u].load(x + u * p.x_seq_stride);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) step(in[u]);
      x += kUnroll * p.x_seq_stride;
    } else {
      for (int u = 0; u < left; ++u, x += p.x_seq_stride) {
        in[0].load(x);
        step(in[0]);
      }
    }
  }
}

// Positions [t0, t1), run by run.
template <class T, int kWidth, int kLanes, int kThreads>
__device__ __forceinline__ void forward_piece(const Params& p, int64_t batch, int64_t channel, int64_t t0, int64_t t1) {
  using A = acc_t<T>;
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  Filter<A, kWidth, kLanes, kThreads> filter;
  Taps<A, kWidth, kWidth, kLanes, kThreads> tap;
  place(filter.weight, 0, static_cast<int>(threadIdx.x));
  place(tap, width, static_cast<int>(threadIdx.x));
  filter.load(p, width, channel);
  for (int64_t t = t0; t < t1;) {
    const Bounds s = bounds_at(p, batch, t, t1);
    const int64_t end = min(s.end, t1);
    forward_run<T, kWidth, kLanes>(p, width, filter, tap, s, batch, channel, t, end);
    t = end;
  }
}

template <class T, int kWidth, int kLanes>
__global__ void __launch_bounds__(kRowThreads) forward_rows(const Params p, const Tiling tiling) {
  if (blockIdx.x >= tiling.tiles) {
    return final_state<T>(p, tiling.num_states, static_cast<int64_t>(blockIdx.x - tiling.tiles) * kRowThreads + threadIdx.x);
  }
  const uint32_t channels = blockIdx.x % tiling.channel_blocks;
  const uint32_t piece = blockIdx.x / tiling.channel_blocks % tiling.pieces;
  const uint32_t batch = blockIdx.x / tiling.channel_blocks / tiling.pieces;
  const int64_t channel = (static_cast<int64_t>(channels) * kRowThreads + threadIdx.x) * kLanes;
  if (channel >= p.dim) return;
  const int64_t t0 = piece * tiling.steps;
  forward_piece<T, kWidth, kLanes, kRowThreads>(p, batch, channel, t0, min(t0 + tiling.steps, p.seqlen));
}

}  // namespace fastlm::causal_conv1d::cuda
