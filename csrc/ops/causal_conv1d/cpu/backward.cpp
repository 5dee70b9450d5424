// Depthwise causal convolution, backward. With p_t the pre-activation (recomputed) and dp_t = dout_t * act'(p_t):
//   dx_s = sum_j w_j dp_{s+(W-1)-j},  dw_j = sum_t dp_t x_{t-(W-1)+j},  db = sum_t dp_t,
// and the same dx formula at the W-1 positions before a segment gives the gradient of its initial state. What arrives through the
// final state is added where the final state was copied from. Every piece of work (a tile of positions, or a channel of a
// segment) writes its own partial dw and db; reduce_partial adds them in order, so results do not depend on the number of
// threads.
#include "core/scratch.h"
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/cpu/taps.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using causal_conv1d::BackwardParams;
using causal_conv1d::kMaxWidth;
using causal_conv1d::kTile;
using causal_conv1d::Segment;

constexpr int64_t kChannelBlock = 256;  // dp of one tile and block: 67 x 256 x 4 bytes, inside the second-level cache
constexpr int64_t kTimeBlock = 1024;

// What the final state's gradient adds to the input at position t (t may lie before the segment: the initial state).
template <class T>
FASTLM_INLINE acc_t<T> from_final_state(const BackwardParams& p, const Segment& s, int64_t d, int64_t t) {
  const int64_t keep = p.width - 1;
  const int64_t i = t - (s.end - keep);
  if (p.dfinal_states == nullptr || s.final_state < 0 || i < 0 || i >= keep) return acc_t<T>(0);
  return to_acc(static_cast<const T*>(p.dfinal_states)[(s.final_state * p.dim + d) * keep + i]);
}

template <class T>
FASTLM_INLINE vec_t<T> pre_activation_grad(vec_t<T> dout, vec_t<T> sum, bool use_silu) {
  return use_silu ? dout * silu_grad(sum) : dout;
}

// The W-1 positions before the segment. dp(t) is asked for t in [begin, min(begin + W - 1, end)).
template <class T, class Dp>
FASTLM_INLINE void initial_state_grad(const BackwardParams& p, const Segment& s, int64_t d, const acc_t<T>* w, Dp dp) {
  using A = acc_t<T>;
  const int64_t keep = p.width - 1;
  T* out = static_cast<T*>(p.dinitial_states) + (s.initial * p.dim + d) * keep;
  for (int64_t i = 0; i < keep; ++i) {
    const int64_t t = s.begin - keep + i;
    A sum = from_final_state<T>(p, s, d, t);
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t source = t + keep - j;
      if (!s.padding && source >= s.begin && source < s.end) sum += w[j * p.dim + d] * dp(source);
    }
    out[i] = from_acc<T>(sum);
  }
}

template <class T>
void backward_tile(const BackwardParams& p, const Segment& s, const acc_t<T>* w, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                   acc_t<T>* dp, acc_t<T>* partial) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t keep = p.width - 1;
  const int64_t halo = min_of(t1 + keep, s.end);
  const int64_t block = c1 - c0;
  const T* x = static_cast<const T*>(p.x) + s.batch * p.x_batch_stride;
  const T* dout = static_cast<const T*>(p.dout) + s.batch * p.dout_batch_stride;
  T* dx = static_cast<T*>(p.dx) + s.batch * p.dx_batch_stride;

  for (int64_t c = c0; c < c1; c += kLanes) {
    const int64_t n = c1 - c;
    V dw[kMaxWidth + 1] = {};
    for (int64_t t = t0; t < halo; ++t) {
      V sum = load_upto(w + p.width * p.dim + c, n);
      V tap[kMaxWidth];
      for (int64_t j = 0; j < p.width; ++j) {
        const int64_t source = t - keep + j;
        tap[j] = source >= s.begin ? load_upto(x + source * p.x_seq_stride + c, n) : inputs_at<T>(p, s, c, source, n);
        sum = fma(load_upto(w + j * p.dim + c, n), tap[j], sum);
      }
      const V grad = pre_activation_grad<T>(load_upto(dout + t * p.dout_seq_stride + c, n), sum, p.silu);
      store_upto(dp + (t - t0) * block + (c - c0), grad, n);
      if (t < t1) {
        for (int64_t j = 0; j < p.width; ++j) dw[j] = fma(grad, tap[j], dw[j]);
        dw[p.width] += grad;
      }
    }
    for (int64_t j = 0; j <= p.width; ++j) store_upto(partial + j * p.dim + c, dw[j], n);

    for (int64_t t = t0; t < t1; ++t) {
      V sum = zero<V>();
      if (p.dfinal_states != nullptr && t >= s.end - keep) {
        A lane[kLanes] = {};
        for (int64_t i = 0; i < n && i < kLanes; ++i) lane[i] = from_final_state<T>(p, s, c + i, t);
        sum = load(lane);
      }
      for (int64_t j = 0; j < p.width; ++j) {
        const int64_t source = t + keep - j;
        if (source < halo) {
          sum = fma(load_upto(w + j * p.dim + c, n), load_upto(dp + (source - t0) * block + (c - c0), n), sum);
        }
      }
      store_upto(dx + t * p.dx_seq_stride + c, sum, n);
    }
  }
  if (t0 == s.begin && s.initial >= 0 && p.dinitial_states != nullptr) {
    for (int64_t d = c0; d < c1; ++d) {
      initial_state_grad<T>(p, s, d, w, [&](int64_t t) { return dp[(t - t0) * block + (d - c0)]; });
    }
  }
}

template <class T>
void zero_padding(const BackwardParams& p, const Segment& s, int64_t t0, int64_t t1, int64_t d0, int64_t d1) {
  T* dx = static_cast<T*>(p.dx) + s.batch * p.dx_batch_stride;
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t d = d0; d < d1; ++d) {
      dx[t * p.dx_seq_stride + d * p.dx_dim_stride] = from_acc<T>(from_final_state<T>(p, s, d, t));
    }
  }
}

template <class T>
void backward_rows(const BackwardParams& p, const void* prepared, const int64_t* tile_begin, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* w = static_cast<const A*>(prepared);
  A* dp = static_cast<A*>(thread_scratch(sizeof(A) * (kTile + kMaxWidth) * kChannelBlock));
  if (dp == nullptr) return;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t index = find_segment(tile_begin, p.num_segments, tile);
    const Segment& s = p.segments[index];
    const int64_t t0 = s.begin + (tile - tile_begin[index]) * kTile;
    const int64_t t1 = min_of(t0 + kTile, s.end);
    A* partial = static_cast<A*>(p.partial) + tile * (p.width + 1) * p.dim;
    if (s.padding) {
      zero_padding<T>(p, s, t0, t1, 0, p.dim);
      for (int64_t i = 0; i < (p.width + 1) * p.dim; ++i) partial[i] = A(0);
      if (t0 == s.begin && s.initial >= 0 && p.dinitial_states != nullptr) {
        for (int64_t d = 0; d < p.dim; ++d) initial_state_grad<T>(p, s, d, w, [](int64_t) { return A(0); });
      }
      continue;
    }
    for (int64_t c = 0; c < p.dim; c += kChannelBlock) {
      backward_tile<T>(p, s, w, t0, t1, c, min_of(c + kChannelBlock, p.dim), dp, partial);
    }
  }
}

template <class T>
void backward_channel(const BackwardParams& p, const Segment& s, int64_t d, const acc_t<T>* w, acc_t<T>* dp, acc_t<T>* partial) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t keep = p.width - 1;
  const T* x = static_cast<const T*>(p.x) + s.batch * p.x_batch_stride + d * p.x_dim_stride;
  const T* dout = static_cast<const T*>(p.dout) + s.batch * p.dout_batch_stride + d * p.dout_dim_stride;
  T* dx = static_cast<T*>(p.dx) + s.batch * p.dx_batch_stride + d * p.dx_dim_stride;
  V tap[kMaxWidth];
  for (int64_t j = 0; j < p.width; ++j) tap[j] = broadcast<V>(w[j * p.dim + d]);
  const V bias = broadcast<V>(w[p.width * p.dim + d]);
  V dw[kMaxWidth + 1] = {};

  for (int64_t t0 = s.begin; t0 < s.end; t0 += kTimeBlock) {
    const int64_t t1 = min_of(t0 + kTimeBlock, s.end);
    const int64_t halo = min_of(t1 + keep, s.end);
    for (int64_t t = t0; t < halo; t += kLanes) {
      const int64_t n = halo - t;
      const int64_t own = t1 - t;  // lanes that count for dw
      V in[kMaxWidth];
      V sum = bias;
      for (int64_t j = 0; j < p.width; ++j) {
        const int64_t source = t - keep + j;
        if (source >= s.begin) {
          in[j] = load_upto(x + source, n);
        } else {
          A lane[kLanes] = {};
          for (int64_t i = 0; i < n && i < kLanes; ++i) lane[i] = input_at<T>(p, s, d, source + i);
          in[j] = load(lane);
        }
        sum = fma(tap[j], in[j], sum);
      }
      V grad = pre_activation_grad<T>(load_upto(dout + t, n), sum, p.silu);
      store_upto(dp + (t - t0), grad, n);
      if (own <= 0) continue;
      if (own < kLanes) grad = load_partial(dp + (t - t0), own);
      for (int64_t j = 0; j < p.width; ++j) dw[j] = fma(grad, in[j], dw[j]);
      dw[p.width] += grad;
    }
    for (int64_t t = t0; t < t1; t += kLanes) {
      const int64_t n = t1 - t;
      V sum = zero<V>();
      for (int64_t j = 0; j < p.width; ++j) {
        const int64_t source = t + keep - j;
        if (source < halo) sum = fma(tap[j], load_upto(dp + (source - t0), min_of(n, halo - source)), sum);
      }
      if (p.dfinal_states != nullptr && t + kLanes > s.end - keep) {
        A lane[kLanes] = {};
        for (int64_t i = 0; i < n && i < kLanes; ++i) lane[i] = from_final_state<T>(p, s, d, t + i);
        sum += load(lane);
      }
      store_upto(dx + t, sum, n);
    }
    if (t0 == s.begin && s.initial >= 0 && p.dinitial_states != nullptr) {
      initial_state_grad<T>(p, s, d, w, [&](int64_t t) { return dp[t - t0]; });
    }
  }
  for (int64_t j = 0; j <= p.width; ++j) partial[j * p.dim + d] = reduce_add(dw[j]);
}

template <class T>
void backward_channels(const BackwardParams& p, const void* prepared, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* w = static_cast<const A*>(prepared);
  A* dp = static_cast<A*>(thread_scratch(sizeof(A) * (kTimeBlock + kMaxWidth)));
  if (dp == nullptr) return;
  for (int64_t item = begin; item < end; ++item) {
    const Segment& s = p.segments[item / p.dim];
    const int64_t d = item % p.dim;
    A* partial = static_cast<A*>(p.partial) + (item / p.dim) * (p.width + 1) * p.dim;
    if (s.padding) {
      zero_padding<T>(p, s, s.begin, s.end, d, d + 1);
      for (int64_t j = 0; j <= p.width; ++j) partial[j * p.dim + d] = A(0);
      if (s.initial >= 0 && p.dinitial_states != nullptr) {
        initial_state_grad<T>(p, s, d, w, [](int64_t) { return A(0); });
      }
    } else {
      backward_channel<T>(p, s, d, w, dp, partial);
    }
  }
}

template <class T>
void reduce_partial(const void* partial_ptr, int64_t pieces, int64_t dim, int64_t width, void* dweight_ptr, void* dbias_ptr,
                    int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* partial = static_cast<const A*>(partial_ptr);
  A* dweight = static_cast<A*>(dweight_ptr);
  A* dbias = static_cast<A*>(dbias_ptr);
  for (int64_t d = begin; d < end; ++d) {
    for (int64_t j = 0; j <= width; ++j) {
      A sum = A(0);
      for (int64_t i = 0; i < pieces; ++i) sum += partial[(i * (width + 1) + j) * dim + d];
      if (j < width) {
        dweight[d * width + j] = sum;
      } else {
        dbias[d] = sum;
      }
    }
  }
}

}  // namespace

extern const causal_conv1d::BackwardKernels causal_conv1d_backward;
const causal_conv1d::BackwardKernels causal_conv1d_backward = {
    {backward_rows<float>, backward_rows<bfloat16>, backward_rows<float16>, backward_rows<double>},
    {backward_channels<float>, backward_channels<bfloat16>, backward_channels<float16>, backward_channels<double>},
    {reduce_partial<float>, reduce_partial<bfloat16>, reduce_partial<float16>, reduce_partial<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
