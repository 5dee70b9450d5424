// Segments on the device: which positions a filter tap may read. Three sources: a row is one segment, packed sequences
// (cu_seqlens), or document ids (seq_idx). They are looked up where a thread's run of positions begins, not at every position.
// Everything read is clamped into the row.
#pragma once

#include "ops/causal_conv1d/cuda/lanes.cuh"

namespace fastlm::causal_conv1d::cuda {

using fastlm::cuda::load_index;

struct Bounds {
  int64_t begin, end;   // positions the segment covers (with seq_idx: those within reach)
  int64_t initial;      // row of initial_states, or -1
  int64_t final_state;  // row of final_states, or -1
  bool padding;
};

__device__ __forceinline__ int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// The segment of position t of row `batch`. With seq_idx its begin is exact up to W-1 positions before t, its end up to `limit`.
__device__ inline Bounds bounds_at(const Params& p, int64_t batch, int64_t t, int64_t limit) {
  const DeviceSegments& d = p.device;
  if (d.cu_seqlens != nullptr) {
    if (d.num_sequences <= 0) return {0, p.seqlen, -1, -1, false};
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
    const auto id_of = [&](int64_t i) {
      return load_index(d.seq_idx, d.seq_idx_64, batch * d.seq_idx_batch_stride + i * d.seq_idx_seq_stride);
    };
    const int64_t id = id_of(t);
    int64_t begin = t;
    while (begin > 0 && t - begin < p.width - 1 && id_of(begin - 1) == id) --begin;
    int64_t end = t + 1;
    limit = min(limit, p.seqlen);
    while (end < limit) {  // four ids under way at once
      int64_t next[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) next[i] = id_of(min(end + i, limit - 1));
      int same = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) same += same == i && next[i] == id && end + i < limit;
      end += same;
      if (same < 4) break;
    }
    return {begin, end, begin == 0 ? batch : -1, end == p.seqlen ? batch : -1, id < 0};
  }
  return {0, p.seqlen, batch, batch, false};
}

// The input of a segment at position t, which may lie up to W-1 positions before its begin.
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

// The W-1 inputs before position t of a thread's channels, into taps 0 to W-2.
template <class T, int kLanes, class Window>
__device__ __forceinline__ void start_window(const Params& p, int width, const Bounds& s, int64_t batch, int64_t channel,
                                             int64_t t, Window& tap) {
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel * p.x_dim_stride;
#pragma unroll
  for (int j = 0; j + 1 < width; ++j) {
    const int64_t source = t - width + 1 + j;
    if (source >= s.begin) {
      Elements<T, kLanes> in;
      in.load(x + source * p.x_seq_stride);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) tap(j, i) = in.get(i);
    } else {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) tap(j, i) = input_at<T>(p, s, batch, channel + i, source);
    }
  }
}

// The segment a state belongs to, and its row of the batch. With seq_idx: the row's first or last document.
__device__ inline Bounds segment_of_state(const Params& p, int64_t state, bool first, int64_t& batch) {
  const DeviceSegments& d = p.device;
  batch = d.cu_seqlens != nullptr ? 0 : state;
  if (d.cu_seqlens != nullptr) {
    const int64_t begin = clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, state), 0, p.seqlen);
    return {begin, clamp_to(load_index(d.cu_seqlens, d.cu_seqlens_64, state + 1), begin, p.seqlen), state, state, false};
  }
  if (d.seq_idx != nullptr && p.seqlen > 0) return bounds_at(p, batch, first ? 0 : p.seqlen - 1, p.width);
  return {0, p.seqlen, state, state, false};
}

// Element `item` of the final states (S, D, W-1): the last W-1 inputs of each segment.
template <class T>
__device__ __forceinline__ void final_state(const Params& p, int64_t num_states, int64_t item) {
  const int64_t keep = p.width - 1;
  if (item >= num_states * p.dim * keep) return;
  const int64_t i = item % keep;
  const int64_t channel = item / keep % p.dim;
  int64_t batch;
  const Bounds s = segment_of_state(p, item / keep / p.dim, false, batch);
  static_cast<T*>(p.final_states)[item] = from_acc<T>(input_at<T>(p, s, batch, channel, s.end - keep + i));
}

}  // namespace fastlm::causal_conv1d::cuda
