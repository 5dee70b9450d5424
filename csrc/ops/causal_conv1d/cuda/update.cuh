// Depthwise causal convolution on CUDA, decoding step of one or m tokens: one thread per (row, channel), see ../cpu/update.cpp.
// Slots that do not exist are treated as padding: the host does not see their numbers.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

using fastlm::cuda::from_acc;
using fastlm::cuda::load_param;
using fastlm::cuda::sigmoid;
using fastlm::cuda::to_acc;

__device__ __forceinline__ int64_t ring_slot(int64_t position, int64_t size) {
  const int64_t slot = position % size;
  return slot < 0 ? slot + size : slot;
}

template <class T>
__global__ void __launch_bounds__(128) update(const UpdateParams p) {
  using A = acc_t<T>;
  const int64_t keep = p.width - 1;
  const int64_t total = p.batch * p.dim;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = item / p.dim;
    const int64_t d = item % p.dim;
    const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + d * p.x_dim_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_batch_stride + d * p.out_dim_stride;
    const int64_t slot = p.conv_state_indices == nullptr ? row : p.conv_state_indices[row];
    if (slot < 0 || slot >= p.num_slots) {
      for (int64_t t = 0; t < p.num_tokens; ++t) out[t * p.out_seq_stride] = from_acc<T>(A(0));
      continue;
    }
    T* state = static_cast<T*>(p.conv_state) + slot * p.state_batch_stride + d * p.state_dim_stride;
    const int64_t step = p.state_len_stride;
    const bool ring = p.cache_seqlens != nullptr;
    const int64_t seen = ring ? p.cache_seqlens[row] : 0;

    A w[kMaxWidth];
    A window[kMaxWidth];
    for (int64_t j = 0; j < p.width; ++j) {
      w[j] = load_param<A>(p.weight, p.weight_dtype, d * p.weight_dim_stride + j * p.weight_width_stride);
    }
    const A bias = load_param<A>(p.bias, p.bias_dtype, d * p.bias_stride);
    for (int64_t i = 0; i < keep; ++i) {
      const int64_t from = ring ? ring_slot(seen - keep + i, p.state_len) : p.state_len - keep + i;
      window[i] = to_acc(state[from * step]);
    }
    if (!ring) {
      for (int64_t i = 0; i + p.num_tokens < p.state_len; ++i) state[i * step] = state[(i + p.num_tokens) * step];
    }
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      const T raw = x[t * p.x_seq_stride];
      window[keep] = to_acc(raw);
      if (ring) {
        state[ring_slot(seen + t, p.state_len) * step] = raw;
      } else if (p.state_len - p.num_tokens + t >= 0) {
        state[(p.state_len - p.num_tokens + t) * step] = raw;
      }
      A sum = bias;
      for (int64_t j = 0; j < p.width; ++j) sum += w[j] * window[j];
      out[t * p.out_seq_stride] = from_acc<T>(p.silu ? sum * sigmoid(sum) : sum);
      for (int64_t i = 0; i < keep; ++i) window[i] = window[i + 1];
    }
  }
}

}  // namespace
}  // namespace fastlm::causal_conv1d::cuda
