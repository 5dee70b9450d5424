// Where a filter tap reads: inside its segment in x, before the segment in the initial state, or nowhere (zero).
// Per-level code: included by the kernels only.
#pragma once

#include "core/simd/simd.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// One input value at position t of the segment, t in [begin - (W-1), end).
template <class T>
FASTLM_INLINE acc_t<T> input_at(const causal_conv1d::Params& p, const causal_conv1d::Segment& s, int64_t channel, int64_t t) {
  if (t >= s.begin) {
    return to_acc(static_cast<const T*>(p.x)[s.batch * p.x_batch_stride + channel * p.x_dim_stride + t * p.x_seq_stride]);
  }
  if (s.initial < 0) return acc_t<T>(0);
  const int64_t i = t - s.begin + p.width - 1;
  return to_acc(static_cast<const T*>(
      p.initial_states)[s.initial * p.initial_batch_stride + channel * p.initial_dim_stride + i * p.initial_width_stride]);
}

// The same for a vector of n channels in channel-last memory.
template <class T>
FASTLM_INLINE vec_t<T> inputs_at(const causal_conv1d::Params& p, const causal_conv1d::Segment& s, int64_t channel, int64_t t,
                                 int64_t n) {
  if (t >= s.begin) {
    return load_upto(static_cast<const T*>(p.x) + s.batch * p.x_batch_stride + channel + t * p.x_seq_stride, n);
  }
  acc_t<T> lane[lanes_of<T>] = {};
  for (int64_t i = 0; i < n && i < lanes_of<T>; ++i) lane[i] = input_at<T>(p, s, channel + i, t);
  return load(lane);
}

// Which segment a tile belongs to: the last one that begins at or before it.
FASTLM_INLINE int64_t find_segment(const int64_t* tile_begin, int64_t num_segments, int64_t tile) {
  int64_t low = 0;
  int64_t high = num_segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (tile_begin[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
