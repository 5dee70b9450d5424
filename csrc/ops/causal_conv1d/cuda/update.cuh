// Depthwise causal convolution on CUDA, decoding step of one or m tokens (see ../cpu/update.cpp). Bound by DRAM for large batches
// (the state read and written), by the launch for small ones. Slots that do not exist are padding: the host does not see their
// numbers.
#pragma once

#include "ops/causal_conv1d/cuda/lanes.cuh"

namespace fastlm::causal_conv1d::cuda {

constexpr int kUpdateThreads = 64;

// The row's slot, or -1.
__device__ __forceinline__ int64_t slot_of(const UpdateParams& p, int64_t row) {
  const DeviceRows& d = p.device;
  if (d.conv_state_indices == nullptr) return row;
  const int64_t slot = fastlm::cuda::load_index(d.conv_state_indices, d.conv_state_indices_64, row * d.conv_state_indices_stride);
  return slot < p.num_slots ? slot : -1;
}

// One token, a filter of four taps, a state of kState contiguous elements that is shifted: a thread has kLanes channels, whose
// states lie next to each other.
template <class T, int kState>
__global__ void __launch_bounds__(kUpdateThreads) update_one_token(const UpdateParams p, uint32_t blocks_per_row) {
  using A = acc_t<T>;
  constexpr int kWidth = 4;
  constexpr int kLanes = 4;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x % blocks_per_row) * kUpdateThreads + threadIdx.x) * kLanes;
  if (channel >= p.dim) return;
  T* out = static_cast<T*>(p.out) + row * p.out_batch_stride + channel;
  const int64_t slot = slot_of(p, row);
  Elements<T, kLanes> result;
  A sum[kLanes] = {};
  if (slot < 0) {
    result.set(sum);
    result.words.store_whole(out);
    return;
  }
  T* state = static_cast<T*>(p.conv_state) + slot * p.state_batch_stride + channel * kState;
  Elements<T, kLanes * kState> old, shifted;
  Elements<T, kLanes> x;
  old.words.load_state(state);
  x.load(static_cast<const T*>(p.x) + row * p.x_batch_stride + channel);
  Filter<A, kWidth, kLanes, kUpdateThreads> filter;
  filter.load(p, kWidth, channel);
  A next[kLanes * kState];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    sum[i] = filter.bias[i];
#pragma unroll
    for (int j = 0; j < kWidth - 1; ++j) {
      sum[i] = multiply_add(filter.weight(j, i), old.get(i * kState + kState - (kWidth - 1) + j), sum[i]);
    }
    sum[i] = activate(multiply_add(filter.weight(kWidth - 1, i), x.get(i), sum[i]), p.silu);
#pragma unroll
    for (int j = 0; j < kState; ++j) next[i * kState + j] = j + 1 < kState ? old.get(i * kState + j + 1) : x.get(i);
  }
  shifted.set(next);  // rounds values of T to T: nothing changes
  shifted.words.store_whole(state);
  result.set(sum);
  result.words.store_whole(out);
}

// Anything else: one channel to a thread, its weights and window a column of shared memory.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads) update_tokens(const UpdateParams p, uint32_t blocks_per_row) {
  using A = acc_t<T>;
  const int width = static_cast<int>(p.width);
  const int keep = width - 1;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t d = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kUpdateThreads + threadIdx.x;
  if (d >= p.dim) return;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + d * p.x_dim_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_batch_stride + d * p.out_dim_stride;
  const int64_t slot = slot_of(p, row);
  if (slot < 0) {
    for (int64_t t = 0; t < p.num_tokens; ++t) out[t * p.out_seq_stride] = from_acc<T>(A(0));
    return;
  }
  T* state = static_cast<T*>(p.conv_state) + slot * p.state_batch_stride + d * p.state_dim_stride;
  const int64_t step = p.state_len_stride;
  const int64_t size = p.state_len;
  const bool ring = p.device.cache_seqlens != nullptr;
  int64_t place_of_next = size;  // shift: the newest is last
  if (ring) {
    const DeviceRows& r = p.device;
    place_of_next = fastlm::cuda::load_index(r.cache_seqlens, r.cache_seqlens_64, row * r.cache_seqlens_stride) % size;
    if (place_of_next < 0) place_of_next += size;
  }

  Filter<A, 0, 1, kUpdateThreads> filter;
  Column<A, kUpdateThreads> window;
  place(filter.weight, 0, static_cast<int>(threadIdx.x));
  place(window, width, static_cast<int>(threadIdx.x));
  filter.load(p, width, d);
  for (int i = 0; i < keep; ++i) {  // keep <= size
    const int64_t from = place_of_next - keep + i;
    window(i, 0) = to_acc(state[(from < 0 ? from + size : from) * step]);
  }
  if (!ring) {  // make room: the newest S - m of the old inputs move to the front
    for (int64_t i = 0; i + p.num_tokens < size; ++i) state[i * step] = state[(i + p.num_tokens) * step];
  }
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const T raw = x[t * p.x_seq_stride];
    if (ring) {
      state[place_of_next * step] = raw;
      place_of_next = place_of_next + 1 < size ? place_of_next + 1 : 0;
    } else if (size - p.num_tokens + t >= 0) {
      state[(size - p.num_tokens + t) * step] = raw;
    }
    window(keep, 0) = to_acc(raw);
    A sum = filter.bias[0];
    for (int j = 0; j < width; ++j) sum = multiply_add(filter.weight(j, 0), window(j, 0), sum);
    out[t * p.out_seq_stride] = from_acc<T>(activate(sum, p.silu));
    for (int i = 0; i < keep; ++i) window(i, 0) = window(i + 1, 0);
  }
}

}  // namespace fastlm::causal_conv1d::cuda
