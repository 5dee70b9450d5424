// Depthwise causal convolution, decoding step of one or m tokens: the state holds the last inputs of each channel, oldest first
// (shifted in place), or is a ring in which token number n lies at slot n mod S. The filter's window is carried through the m
// tokens in registers, so a state shorter than W-1+m is enough.
#include "core/simd/strided.h"
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/cpu/taps.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using causal_conv1d::kMaxWidth;
using causal_conv1d::UpdateParams;

FASTLM_INLINE int64_t ring_slot(int64_t position, int64_t size) {
  const int64_t slot = position % size;
  return slot < 0 ? slot + size : slot;
}

template <class T>
void update_channel(const UpdateParams& p, int64_t row, int64_t slot, int64_t d) {
  using A = acc_t<T>;
  const int64_t keep = p.width - 1;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride + d * p.x_dim_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_batch_stride + d * p.out_dim_stride;
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
  if (!ring) {  // make room: the newest S - m of the old inputs move to the front
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

// One token for channels [d0, d1) of a row, without a ring: sums go to a buffer first, so that the activation runs in vectors.
constexpr int64_t kBlock = 64;

// The same where state, weight and token lie densely and the state holds just the inputs the filter needs: sizes known, the
// compiler lays the loops over the channels into vectors.
template <int kWidth, class T, class P>
FASTLM_INLINE void one_token_dense(const P* __restrict__ weight, const T* __restrict__ x, T* __restrict__ state, int64_t count,
                                   acc_t<T>* __restrict__ sums) {
  using A = acc_t<T>;
  constexpr int kKeep = kWidth - 1;
  for (int64_t d = 0; d < count; ++d) {
    A sum = sums[d];
    for (int j = 0; j < kKeep; ++j) sum += static_cast<A>(to_acc(weight[d * kWidth + j])) * to_acc(state[d * kKeep + j]);
    sums[d] = sum + static_cast<A>(to_acc(weight[d * kWidth + kKeep])) * to_acc(x[d]);
    for (int j = 0; j + 1 < kKeep; ++j) state[d * kKeep + j] = state[d * kKeep + j + 1];
    state[d * kKeep + kKeep - 1] = x[d];
  }
}

// bf16 with a filter of 4, a vector of channels: taken apart by shuffles, for the compiler goes channel by channel.
FASTLM_INLINE void one_token_bf16(const bfloat16* weight, const bfloat16* x, bfloat16* state, float* sums) {
  const auto as_floats = [](VecH h) { return (VecF)(widen(h) << 16); };
  const VecI upper = static_cast<int32_t>(0xffff0000u) - VecI{};
  VecI pairs[2], first, second;  // taps (0, 1) and (2, 3) of each channel
  __builtin_memcpy(pairs, weight, sizeof(pairs));
  split_twos(pairs, first, second);
  VecH past[3], now;
  load_threes(state, past);
  __builtin_memcpy(&now, x, sizeof(now));
  VecF sum = load(sums);
  sum = fma((VecF)(first << 16), as_floats(past[0]), sum);
  sum = fma((VecF)(first & upper), as_floats(past[1]), sum);
  sum = fma((VecF)(second << 16), as_floats(past[2]), sum);
  store(sums, fma((VecF)(second & upper), as_floats(now), sum));
  store_threes(state, past[1], past[2], now);
}

template <>
FASTLM_INLINE void one_token_dense<4, bfloat16, bfloat16>(const bfloat16* __restrict__ weight, const bfloat16* __restrict__ x,
                                                          bfloat16* __restrict__ state, int64_t count, float* __restrict__ sums) {
  int64_t d = 0;
  for (; d + kLanesF <= count; d += kLanesF) {
    one_token_bf16(weight + d * 4, x + d, state + d * 3, sums + d);
  }
  for (; d < count; ++d) {
    for (int j = 0; j < 3; ++j) sums[d] += to_acc(weight[d * 4 + j]) * to_acc(state[d * 3 + j]);
    sums[d] += to_acc(weight[d * 4 + 3]) * to_acc(x[d]);
    state[d * 3] = state[d * 3 + 1];
    state[d * 3 + 1] = state[d * 3 + 2];
    state[d * 3 + 2] = x[d];
  }
}

template <class T, class P>
FASTLM_INLINE void one_token_sums(const UpdateParams& p, const P* weight, const T* x, T* state, int64_t d0, int64_t d1,
                                  acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t keep = p.width - 1;
  const int64_t last = p.state_len - 1;
  if (p.width == 4 && p.state_len == 3 && p.state_len_stride == 1 && p.state_dim_stride == 3 && p.weight_width_stride == 1 &&
      p.weight_dim_stride == 4 && p.x_dim_stride == 1) {
    return one_token_dense<4>(weight + d0 * 4, x + d0, state + d0 * 3, d1 - d0, sums);
  }
  for (int64_t d = d0; d < d1; ++d) {
    const P* w = weight + d * p.weight_dim_stride;
    T* s = state + d * p.state_dim_stride;
    const T raw = x[d * p.x_dim_stride];
    A sum = sums[d - d0];
    for (int64_t j = 0; j < keep; ++j) {
      sum += static_cast<A>(to_acc(w[j * p.weight_width_stride])) * to_acc(s[(p.state_len - keep + j) * p.state_len_stride]);
    }
    sums[d - d0] = sum + static_cast<A>(to_acc(w[keep * p.weight_width_stride])) * to_acc(raw);
    for (int64_t i = 0; i < last; ++i) s[i * p.state_len_stride] = s[(i + 1) * p.state_len_stride];
    if (last >= 0) s[last * p.state_len_stride] = raw;
  }
}

template <class T>
void update_one_token(const UpdateParams& p, int64_t row, int64_t slot, int64_t d0, int64_t d1) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const T* x = static_cast<const T*>(p.x) + row * p.x_batch_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_batch_stride;
  T* state = static_cast<T*>(p.conv_state) + slot * p.state_batch_stride;
  for (int64_t c0 = d0; c0 < d1; c0 += kBlock) {
    const int64_t c1 = min_of(c0 + kBlock, d1);
    alignas(64) A sums[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) sums[i] = A(0);
    if (p.bias != nullptr) load_params(p.bias, p.bias_dtype, p.bias_stride, c0, c1 - c0, sums);
    switch (p.weight_dtype) {
      case DType::kFloat32:
        one_token_sums<T>(p, static_cast<const float*>(p.weight), x, state, c0, c1, sums);
        break;
      case DType::kBFloat16:
        one_token_sums<T>(p, static_cast<const bfloat16*>(p.weight), x, state, c0, c1, sums);
        break;
      case DType::kFloat16:
        one_token_sums<T>(p, static_cast<const float16*>(p.weight), x, state, c0, c1, sums);
        break;
      case DType::kFloat64:
        one_token_sums<T>(p, static_cast<const double*>(p.weight), x, state, c0, c1, sums);
        break;
    }
    if (p.silu) {
      for (int64_t i = 0; i < kBlock; i += kLanes) store(sums + i, silu(load(sums + i)));
    }
    if (p.out_dim_stride == 1) {
      for (int64_t d = c0; d < c1; d += kLanes) store_upto(out + d, load(sums + d - c0), c1 - d);
    } else {
      for (int64_t d = c0; d < c1; ++d) out[d * p.out_dim_stride] = from_acc<T>(sums[d - c0]);
    }
  }
}

template <class T>
void update(const UpdateParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end;) {
    const int64_t row = item / p.dim;
    const int64_t d0 = item - row * p.dim;
    const int64_t d1 = min_of(p.dim, d0 + (end - item));
    item += d1 - d0;
    const int64_t slot = p.conv_state_indices == nullptr ? row : p.conv_state_indices[row];
    if (slot >= 0 && p.num_tokens == 1 && p.cache_seqlens == nullptr) {
      update_one_token<T>(p, row, slot, d0, d1);
      continue;
    }
    for (int64_t d = d0; d < d1; ++d) {
      if (slot >= 0) {
        update_channel<T>(p, row, slot, d);
        continue;
      }
      T* out = static_cast<T*>(p.out) + row * p.out_batch_stride + d * p.out_dim_stride;
      for (int64_t t = 0; t < p.num_tokens; ++t) out[t * p.out_seq_stride] = from_acc<T>(acc_t<T>(0));
    }
  }
}

}  // namespace

extern const causal_conv1d::UpdateKernels causal_conv1d_update;
const causal_conv1d::UpdateKernels causal_conv1d_update = {
    {update<float>, update<bfloat16>, update<float16>, update<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
