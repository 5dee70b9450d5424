// Depthwise causal convolution on CUDA, backward (formulas: ../cpu/backward.cpp). A thread moves along a piece of time with two
// windows: the inputs at t = s + W-1, from which dp_t is recomputed, and the last W values of dp, from which dx_s follows.
// Weight gradients: each piece writes its own partial sums and a second kernel adds them in order; no atomics, the same bits
// always.
#pragma once

#include "ops/causal_conv1d/cuda/segments.cuh"

namespace fastlm::causal_conv1d::cuda {
namespace {

using fastlm::cuda::from_acc;
using fastlm::cuda::load_param;
using fastlm::cuda::sigmoid;

template <class A>
__device__ __forceinline__ A activation_grad(A sum, bool silu) {
  if (!silu) return A(1);
  const A s = sigmoid(sum);
  return s * (A(1) + sum * (A(1) - s));
}

template <class T>
__device__ __forceinline__ acc_t<T> from_final_state(const BackwardParams& p, const Bounds& s, int64_t channel, int64_t t) {
  const int64_t keep = p.width - 1;
  const int64_t i = t - (s.end - keep);
  if (p.dfinal_states == nullptr || s.final_state < 0 || i < 0 || i >= keep) return acc_t<T>(0);
  return to_acc(static_cast<const T*>(p.dfinal_states)[(s.final_state * p.dim + channel) * keep + i]);
}

template <class T>
__device__ __forceinline__ acc_t<T> dout_at(const BackwardParams& p, int64_t batch, int64_t channel, int64_t t) {
  return to_acc(static_cast<const T*>(p.dout)[batch * p.dout_batch_stride + channel * p.dout_dim_stride + t * p.dout_seq_stride]);
}

// dx for [t0, t1) of one channel; sums the weight gradients of these positions into dw[0..W-1] and the bias gradient into dw[W].
template <class T, int kWidth>
__device__ void backward_piece(const BackwardParams& p, int64_t batch, int64_t channel, int64_t t0, int64_t t1, acc_t<T>* dw) {
  using A = acc_t<T>;
  constexpr int kSize = Window<T, kWidth>::kSize;
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  A w[kSize];
  A dp[kSize];  // dp[j] belongs to position s + j
#pragma unroll
  for (int j = 0; j < width; ++j) {
    w[j] = load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + j * p.weight_width_stride);
    dp[j] = A(0);
  }
  const A bias = load_param<A>(p.bias, p.bias_dtype, channel * p.bias_stride);
  T* dx = static_cast<T*>(p.dx) + batch * p.dx_batch_stride + channel * p.dx_dim_stride;

  Window<T, kWidth> window;
  window.start(p, width, batch, channel, t0);
  Bounds own = window.bounds;  // bounds of s
  for (int64_t t = t0; t < t1 + width - 1; ++t) {
#pragma unroll
    for (int j = 0; j + 1 < width; ++j) dp[j] = dp[j + 1];
    A grad = A(0);
    if (t < p.seqlen) {
      window.shift_to(p, width, batch, channel, t);
      if (!window.bounds.padding) {
        A sum = bias;
#pragma unroll
        for (int j = 0; j < width; ++j) sum += w[j] * window.tap[j];
        grad = dout_at<T>(p, batch, channel, t) * activation_grad(sum, p.silu);
        if (t < t1) {
#pragma unroll
          for (int j = 0; j < width; ++j) dw[j] += grad * window.tap[j];
          dw[width] += grad;
        }
      }
    }
    dp[width - 1] = grad;
    const int64_t s = t - (width - 1);
    if (s < t0) continue;
    // With seq_idx the bounds only hold as far as the filter reaches.
    if (s >= own.end || p.device.seq_idx != nullptr) own = bounds_at(p, batch, s);
    A sum = from_final_state<T>(p, own, channel, s);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (s + j < own.end) sum += w[width - 1 - j] * dp[j];
    }
    dx[s * p.dx_seq_stride] = from_acc<T>(sum);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) backward_rows(const BackwardParams p, int64_t pieces_per_row) {
  using A = acc_t<T>;
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= p.dim) return;
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    for (int64_t piece = blockIdx.y; piece < pieces_per_row; piece += gridDim.y) {
      A dw[Window<T, kWidth>::kSize + 1];
#pragma unroll
      for (int j = 0; j <= width; ++j) dw[j] = A(0);
      const int64_t t0 = piece * kStepsRows;
      backward_piece<T, kWidth>(p, batch, channel, t0, min(t0 + kStepsRows, p.seqlen), dw);
      A* partial = static_cast<A*>(p.partial) + (batch * pieces_per_row + piece) * (width + 1) * p.dim;
#pragma unroll
      for (int j = 0; j <= width; ++j) partial[j * p.dim + channel] = dw[j];
    }
  }
}

// Sum over the block's threads in a fixed order; the result is valid in thread 0.
template <class A>
__device__ A block_sum(A value, A* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const A sum = shared[0];
  __syncthreads();
  return sum;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) backward_channels(const BackwardParams p, int64_t pieces_per_row) {
  using A = acc_t<T>;
  A* shared = reinterpret_cast<A*>(fastlm::cuda::shared_memory());  // (kThreads,)
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    for (int64_t channel = blockIdx.y; channel < p.dim; channel += gridDim.y) {
      A dw[Window<T, kWidth>::kSize + 1];
#pragma unroll
      for (int j = 0; j <= width; ++j) dw[j] = A(0);
      const int64_t t0 = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStepsChannels;
      if (t0 < p.seqlen) {
        backward_piece<T, kWidth>(p, batch, channel, t0, min(t0 + kStepsChannels, p.seqlen), dw);
      }
      A* partial = static_cast<A*>(p.partial) + (batch * pieces_per_row + blockIdx.x) * (width + 1) * p.dim;
      for (int j = 0; j <= width; ++j) {
        const A sum = block_sum(dw[j], shared);
        if (threadIdx.x == 0) partial[j * p.dim + channel] = sum;
      }
    }
  }
}

// One thread per channel and column: sums the pieces in order.
template <class A>
__global__ void reduce_partial(const A* partial, int64_t pieces, int64_t dim, int64_t width, A* dweight, A* dbias) {
  const int64_t columns = (width + 1) * dim;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < columns;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t j = item / dim;
    const int64_t channel = item % dim;
    A sum = A(0);
    for (int64_t i = 0; i < pieces; ++i) sum += partial[i * columns + item];
    if (j < width) {
      dweight[channel * width + j] = sum;
    } else {
      dbias[channel] = sum;
    }
  }
}

// The dx formula at the W-1 positions before each segment; dp is recomputed there, at most W-1 values.
template <class T>
__global__ void initial_state_grad(const BackwardParams p, int64_t num_states) {
  using A = acc_t<T>;
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
      s = bounds_at(p, batch, 0);
    }
    const int64_t t = s.begin - keep + i;
    A sum = from_final_state<T>(p, s, channel, t);
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t source = t + keep - j;
      if (s.padding || source < s.begin || source >= s.end) continue;
      A pre = load_param<A>(p.bias, p.bias_dtype, channel * p.bias_stride);
      for (int64_t k = 0; k < p.width; ++k) {
        pre += load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + k * p.weight_width_stride) *
               input_at<T>(p, s, batch, channel, source - keep + k);
      }
      sum += load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + j * p.weight_width_stride) *
             dout_at<T>(p, batch, channel, source) * activation_grad(pre, p.silu);
    }
    static_cast<T*>(p.dinitial_states)[item] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace fastlm::causal_conv1d::cuda
