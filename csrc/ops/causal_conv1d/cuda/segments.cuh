// Segments on the device: which positions a filter tap may read. Three sources: a row is one segment, packed sequences
// (cu_seqlens), or document ids (seq_idx; only as far as the filter reaches). Everything read is clamped into the row.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {

using fastlm::cuda::load_index;
using fastlm::cuda::to_acc;

struct Bounds {
  int64_t begin, end;   // positions the segment covers (with seq_idx: those within reach)
  int64_t initial;      // row of initial_states, or -1
  int64_t final_state;  // row of final_states, or -1
  bool padding;
};

__device__ __forceinline__ int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

__device__ inline Bounds bounds_at(const Params& p, int64_t batch, int64_t t) {
  const DeviceSegments& d = p.device;
  if (d.cu_seqlens != nullptr) {
    int64_t low = 0;
    int64_t high = d.num_sequences;  // the last sequence that begins at or before t
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (load_index(d.cu_seqlens, d.cu_seqlens_64, middle) <= t) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t begin = clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, low), 0, t);
    const int64_t end = clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, low + 1), t + 1, p.seqlen);
    return {begin, end, low, low, false};
  }
  if (d.seq_idx != nullptr) {
    const int64_t row = batch * d.seq_idx_batch_stride;
    const int64_t id = load_index(d.seq_idx, d.seq_idx_64, row + t * d.seq_idx_seq_stride);
    int64_t begin = t;
    int64_t end = t + 1;
    while (begin > 0 && t - begin < p.width - 1 &&
           load_index(d.seq_idx, d.seq_idx_64, row + (begin - 1) * d.seq_idx_seq_stride) == id) {
      --begin;
    }
    while (end < p.seqlen && end - t < p.width && load_index(d.seq_idx, d.seq_idx_64, row + end * d.seq_idx_seq_stride) == id) {
      ++end;
    }
    return {begin, end, begin == 0 ? batch : -1, end == p.seqlen ? batch : -1, id < 0};
  }
  return {0, p.seqlen, batch, batch, false};
}

// One input of the segment at position t, which may lie up to W-1 positions before its begin.
template <class T>
__device__ __forceinline__ acc_t<T> input_at(const Params& p, const Bounds& s, int64_t batch, int64_t channel, int64_t t) {
  if (t >= s.begin) {
    return to_acc(static_cast<const T*>(p.x)[batch * p.x_batch_stride + channel * p.x_dim_stride + t * p.x_seq_stride]);
  }
  const int64_t i = t - s.begin + p.width - 1;
  if (p.initial_states == nullptr || s.initial < 0 || i < 0) return acc_t<T>(0);
  return to_acc(static_cast<const T*>(
      p.initial_states)[s.initial * p.initial_batch_stride + channel * p.initial_dim_stride + i * p.initial_width_stride]);
}

// The filter's window of one channel, moved along time. kWidth 0: the width is only known at run time.
template <class T, int kWidth>
struct Window {
  static constexpr int kSize = kWidth > 0 ? kWidth : static_cast<int>(kMaxWidth);
  acc_t<T> tap[kSize];
  Bounds bounds;

  // Afterwards shift_to(t) may be called: holds the W-1 inputs before t.
  __device__ __forceinline__ void start(const Params& p, int width, int64_t batch, int64_t channel, int64_t t) {
    bounds = bounds_at(p, batch, t);
#pragma unroll
    for (int j = 1; j < width; ++j) tap[j] = input_at<T>(p, bounds, batch, channel, t - width + j);
  }

  __device__ __forceinline__ void shift_to(const Params& p, int width, int64_t batch, int64_t channel, int64_t t) {
    if (t >= bounds.end) {
      start(p, width, batch, channel, t);
    }
#pragma unroll
    for (int j = 0; j + 1 < width; ++j) tap[j] = tap[j + 1];
    tap[width - 1] = input_at<T>(p, bounds, batch, channel, t);
  }
};

// How a grid covers (B, D, L): channels along threads (channel-last), or pieces of time along threads (channel-first).
constexpr int kThreads = 128;
constexpr int kStepsRows = 32;     // positions per thread in channel-last memory
constexpr int kStepsChannels = 8;  // positions per thread in channel-first memory: 16 bytes of bf16

}  // namespace fastlm::causal_conv1d::cuda
