// Depthwise causal convolution on CUDA, forward, and the final states. A thread carries the filter's window of one channel along
// a piece of time, so every input is read once (plus W-1 at the piece's begin). Bound by DRAM.
#pragma once

#include "ops/causal_conv1d/cuda/segments.cuh"

namespace fastlm::causal_conv1d::cuda {
namespace {

using fastlm::cuda::from_acc;
using fastlm::cuda::load_param;
using fastlm::cuda::sigmoid;

template <class T, int kWidth>
__device__ void forward_piece(const Params& p, int64_t batch, int64_t channel, int64_t t0, int64_t t1) {
  using A = acc_t<T>;
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  A w[Window<T, kWidth>::kSize];
#pragma unroll
  for (int j = 0; j < width; ++j) {
    w[j] = load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + j * p.weight_width_stride);
  }
  const A bias = load_param<A>(p.bias, p.bias_dtype, channel * p.bias_stride);
  T* out = static_cast<T*>(p.out) + batch * p.out_batch_stride + channel * p.out_dim_stride;

  Window<T, kWidth> window;
  window.start(p, width, batch, channel, t0);
  for (int64_t t = t0; t < t1; ++t) {
    window.shift_to(p, width, batch, channel, t);
    A sum = bias;
#pragma unroll
    for (int j = 0; j < width; ++j) sum += w[j] * window.tap[j];
    if (p.silu) sum *= sigmoid(sum);
    out[t * p.out_seq_stride] = from_acc<T>(window.bounds.padding ? A(0) : sum);
  }
}

// Grid: x = channels / kThreads, y = pieces of kStepsRows positions, strided; z = batch, strided.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_rows(const Params p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= p.dim) return;
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    for (int64_t t0 = static_cast<int64_t>(blockIdx.y) * kStepsRows; t0 < p.seqlen;
         t0 += static_cast<int64_t>(gridDim.y) * kStepsRows) {
      forward_piece<T, kWidth>(p, batch, channel, t0, min(t0 + kStepsRows, p.seqlen));
    }
  }
}

// Grid: x = pieces of kThreads * kStepsChannels positions, y = channels, strided; z = batch, strided.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_channels(const Params p) {
  const int64_t t0 = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStepsChannels;
  if (t0 >= p.seqlen) return;
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    for (int64_t channel = blockIdx.y; channel < p.dim; channel += gridDim.y) {
      forward_piece<T, kWidth>(p, batch, channel, t0, min(t0 + kStepsChannels, p.seqlen));
    }
  }
}

template <class T>
__global__ void final_states(const Params p, int64_t num_states) {
  const int64_t keep = p.width - 1;
  const int64_t total = num_states * p.dim * keep;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t i = item % keep;
    const int64_t channel = item / keep % p.dim;
    const int64_t state = item / keep / p.dim;
    const DeviceSegments& d = p.device;
    Bounds s{0, p.seqlen, state, state, false};
    int64_t batch = state;
    if (d.cu_seqlens != nullptr) {
      batch = 0;
      s.begin = clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, state), 0, p.seqlen);
      s.end = clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, state + 1), s.begin, p.seqlen);
    } else if (p.seqlen > 0 && d.seq_idx != nullptr) {
      s = bounds_at(p, batch, p.seqlen - 1);
    }
    static_cast<T*>(p.final_states)[item] = from_acc<T>(input_at<T>(p, s, batch, channel, s.end - keep + i));
  }
}

}  // namespace
}  // namespace fastlm::causal_conv1d::cuda
