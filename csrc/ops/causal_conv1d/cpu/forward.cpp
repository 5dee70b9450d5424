// Depthwise causal convolution, forward: p_t = b + sum_j w_j x_{t-(W-1)+j}, out_t = p_t or SiLU(p_t). Sums in fp32.
// Two loops for two memory layouts: vectors along channels (channel-last rows) or along time (channel-first). Bound by memory
// for long rows; the W loads per output hit the first-level cache.
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/cpu/taps.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using causal_conv1d::kMaxWidth;
using causal_conv1d::kTile;
using causal_conv1d::Params;
using causal_conv1d::Segment;

template <class T>
void prepare_weight(const Params& p, void* prepared_ptr) {
  using A = acc_t<T>;
  A* prepared = static_cast<A*>(prepared_ptr);
  for (int64_t d = 0; d < p.dim; ++d) {
    for (int64_t j = 0; j < p.width; ++j) {
      prepared[j * p.dim + d] = load_param<A>(p.weight, p.weight_dtype, d * p.weight_dim_stride + j * p.weight_width_stride);
    }
    prepared[p.width * p.dim + d] = load_param<A>(p.bias, p.bias_dtype, d * p.bias_stride);
  }
}

template <class T>
FASTLM_INLINE vec_t<T> activate(vec_t<T> v, bool use_silu) {
  return use_silu ? silu(v) : v;
}

// One row of channel-last memory, all taps inside the segment. kWidth 0: the width is only known at run time.
template <class T, int kWidth>
void forward_row(const Params& p, const acc_t<T>* w, const T* x, T* out) {
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t width = kWidth > 0 ? kWidth : p.width;
  for (int64_t c = 0; c < p.dim; c += kLanes) {
    const int64_t n = p.dim - c;
    V sum = load_upto(w + width * p.dim + c, n);
    for (int64_t j = 0; j < width; ++j) {
      sum = fma(load_upto(w + j * p.dim + c, n), load_upto(x + (j - width + 1) * p.x_seq_stride + c, n), sum);
    }
    store_upto(out + c, activate<T>(sum, p.silu), n);
  }
}

// A row near the beginning of its segment.
template <class T>
void forward_first_row(const Params& p, const Segment& s, const acc_t<T>* w, int64_t t, T* out) {
  constexpr int64_t kLanes = lanes_of<T>;
  for (int64_t c = 0; c < p.dim; c += kLanes) {
    const int64_t n = p.dim - c;
    vec_t<T> sum = load_upto(w + p.width * p.dim + c, n);
    for (int64_t j = 0; j < p.width; ++j) {
      sum = fma(load_upto(w + j * p.dim + c, n), inputs_at<T>(p, s, c, t - p.width + 1 + j, n), sum);
    }
    store_upto(out + c, activate<T>(sum, p.silu), n);
  }
}

template <class T>
void forward_rows(const Params& p, const void* prepared, const int64_t* tile_begin, int64_t begin, int64_t end) {
  const auto* w = static_cast<const acc_t<T>*>(prepared);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t index = find_segment(tile_begin, p.num_segments, tile);
    const Segment& s = p.segments[index];
    const int64_t t0 = s.begin + (tile - tile_begin[index]) * kTile;
    const int64_t t1 = min_of(t0 + kTile, s.end);
    for (int64_t t = t0; t < t1; ++t) {
      const T* x = static_cast<const T*>(p.x) + s.batch * p.x_batch_stride + t * p.x_seq_stride;
      T* out = static_cast<T*>(p.out) + s.batch * p.out_batch_stride + t * p.out_seq_stride;
      if (s.padding) {
        for (int64_t c = 0; c < p.dim; ++c) out[c] = from_acc<T>(acc_t<T>(0));
      } else if (t - s.begin < p.width - 1) {
        forward_first_row<T>(p, s, w, t, out);
      } else if (p.width == 4) {
        forward_row<T, 4>(p, w, x, out);
      } else {
        forward_row<T, 0>(p, w, x, out);
      }
    }
  }
}

template <class T, int kWidth>
void forward_channel(const Params& p, const Segment& s, int64_t d, const acc_t<T>* w) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t width = kWidth > 0 ? kWidth : p.width;
  const T* x = static_cast<const T*>(p.x) + s.batch * p.x_batch_stride + d * p.x_dim_stride;
  T* out = static_cast<T*>(p.out) + s.batch * p.out_batch_stride + d * p.out_dim_stride;
  V tap[kWidth > 0 ? kWidth : kMaxWidth];
  for (int64_t j = 0; j < width; ++j) tap[j] = broadcast<V>(w[j * p.dim + d]);
  const V bias = broadcast<V>(w[width * p.dim + d]);

  const int64_t head = min_of(s.begin + width - 1, s.end);
  for (int64_t t = s.begin; t < head; ++t) {
    V sum = bias;
    for (int64_t j = 0; j < width; ++j) sum = fma(tap[j], broadcast<V>(input_at<T>(p, s, d, t - width + 1 + j)), sum);
    const A value = activate<T>(sum, p.silu)[0];
    out[t] = from_acc<T>(value);
  }
  for (int64_t t = head; t < s.end; t += kLanes) {
    const int64_t n = s.end - t;
    V sum = bias;
    for (int64_t j = 0; j < width; ++j) sum = fma(tap[j], load_upto(x + t - width + 1 + j, n), sum);
    store_upto(out + t, activate<T>(sum, p.silu), n);
  }
}

template <class T>
void forward_channels(const Params& p, const void* prepared, int64_t begin, int64_t end) {
  const auto* w = static_cast<const acc_t<T>*>(prepared);
  for (int64_t item = begin; item < end; ++item) {
    const Segment& s = p.segments[item / p.dim];
    const int64_t d = item % p.dim;
    if (s.padding) {
      T* out = static_cast<T*>(p.out) + s.batch * p.out_batch_stride + d * p.out_dim_stride;
      for (int64_t t = s.begin; t < s.end; ++t) out[t] = from_acc<T>(acc_t<T>(0));
    } else if (p.width == 4) {
      forward_channel<T, 4>(p, s, d, w);
    } else {
      forward_channel<T, 0>(p, s, d, w);
    }
  }
}

template <class T>
void final_states(const Params& p, int64_t begin, int64_t end) {
  const int64_t keep = p.width - 1;
  for (int64_t item = begin; item < end; ++item) {
    const Segment& s = p.segments[item / p.dim];
    const int64_t d = item % p.dim;
    if (s.final_state < 0) continue;
    T* out = static_cast<T*>(p.final_states) + (s.final_state * p.dim + d) * keep;
    for (int64_t i = 0; i < keep; ++i) out[i] = from_acc<T>(input_at<T>(p, s, d, s.end - keep + i));
  }
}

}  // namespace

extern const causal_conv1d::ForwardKernels causal_conv1d_forward;
const causal_conv1d::ForwardKernels causal_conv1d_forward = {
    {prepare_weight<float>, prepare_weight<bfloat16>, prepare_weight<float16>, prepare_weight<double>},
    {forward_rows<float>, forward_rows<bfloat16>, forward_rows<float16>, forward_rows<double>},
    {forward_channels<float>, forward_channels<bfloat16>, forward_channels<float16>, forward_channels<double>},
    {final_states<float>, final_states<bfloat16>, final_states<float16>, final_states<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
