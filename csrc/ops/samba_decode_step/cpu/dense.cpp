// Norms and products of one token: y = x W^T with W read once, in order. Bound by the memory that W lies in. Vectors run along
// the rows of W; a few rows and two tokens share what is loaded. An element is summed in the same order whatever rows and tokens
// are computed beside it. Results are rounded where a layer of its own would round.
#include "core/simd/dots.h"
#include "ops/samba_decode_step/cpu/kernels.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using samba_decode_step::Decay;
using samba_decode_step::Norm;
using samba_decode_step::Product;

template <class T>
void normalize(const Norm& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  for (int64_t row = begin; row < end; ++row) {
    const A* x = static_cast<const A*>(p.hidden) + row * p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    V sum = zero<V>();
    for (int64_t c = 0; c < p.width; c += kLanes) {
      const V v = load_upto(x + c, p.width - c);
      sum = fma(v, v, sum);
    }
    const A mean = reduce_add(sum) / static_cast<A>(p.width);
    const A scale = A(1) / static_cast<A>(__builtin_sqrt(mean + static_cast<A>(p.eps)));
    for (int64_t c = 0; c < p.width; c += kLanes) {
      A weight[kLanes];
      for (int64_t i = 0; i < kLanes && c + i < p.width; ++i) {
        weight[i] = load_param<A>(p.weight, p.weight_dtype, (c + i) * p.weight_stride);
      }
      store_upto(out + c, load_upto(x + c, p.width - c) * scale * load_upto(weight, p.width - c), p.width - c);
    }
  }
}

template <class A>
void form_decay(const Decay& p, int64_t begin, int64_t end) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  for (int64_t d = begin; d < end; ++d) {
    A* out = static_cast<A*>(p.out) + d * p.state;
    for (int64_t n = 0; n < p.state; n += kLanes) {
      A lane[kLanes] = {};
      for (int64_t i = 0; i < kLanes && n + i < p.state; ++i) {
        lane[i] = load_param<A>(p.log, p.log_dtype, d * p.dim_stride + (n + i) * p.state_stride);
      }
      const V decay = -exp(load(lane));
      store_upto(out + n, decay, p.state - n);
    }
  }
}

// Rows [row, end) of W, at most kDotRows, times tokens from `token` on, at most kDotTokens; rounded as a layer would.
template <class T>
FASTLM_INLINE void multiply(const Product& p, const void* weight, int64_t stride, int64_t row, int64_t end, int64_t token,
                            acc_t<T> (&sums)[kDotTokens][kDotRows]) {
  const T* rows[kDotRows];
  for (int r = 0; r < kDotRows; ++r) rows[r] = static_cast<const T*>(weight) + min_of(row + r, end - 1) * stride;
  const T* first = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* const x[kDotTokens] = {first, first + p.x_stride};
  if (p.batch - token > 1) {
    dots<T, 2>(rows, stride, x, p.in, sums);
  } else {
    dots<T, 1>(rows, stride, x, p.in, sums);
  }
  for (int t = 0; t < kDotTokens && token + t < p.batch; ++t) {
    for (acc_t<T>& value : sums[t]) value = to_acc(from_acc<T>(value));
  }
}

// Calls use(row, token, value) with every element of x W^T of rows [begin, end).
template <class T, class Use>
FASTLM_INLINE void multiply_rows(const Product& p, int64_t begin, int64_t end, const Use& use) {
  for (int64_t row = begin; row < end; row += kDotRows) {
    for (int64_t token = 0; token < p.batch; token += kDotTokens) {
      acc_t<T> sums[kDotTokens][kDotRows] = {};
      multiply<T>(p, p.weight, p.weight_stride, row, end, token, sums);
      for (int t = 0; t < kDotTokens && token + t < p.batch; ++t) {
        for (int r = 0; r < kDotRows && row + r < end; ++r) use(row + r, token + t, sums[t][r]);
      }
    }
  }
}

template <class T>
void multiply_store(const Product& p, int64_t begin, int64_t end) {
  T* y = static_cast<T*>(p.y);
  multiply_rows<T>(p, begin, end,
                   [&](int64_t row, int64_t token, acc_t<T> value) { y[token * p.y_stride + row] = from_acc<T>(value); });
}

template <class T>
void multiply_add_to(const Product& p, int64_t begin, int64_t end) {
  acc_t<T>* y = static_cast<acc_t<T>*>(p.y);
  multiply_rows<T>(p, begin, end, [&](int64_t row, int64_t token, acc_t<T> value) { y[token * p.y_stride + row] += value; });
}

template <class T>
void multiply_gate(const Product& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  T* y = static_cast<T*>(p.y);
  for (int64_t row = begin; row < end; row += kDotRows) {
    for (int64_t token = 0; token < p.batch; token += kDotTokens) {
      A opened[kDotTokens][kDotRows] = {}, gated[kDotTokens][kDotRows] = {};
      multiply<T>(p, p.weight, p.weight_stride, row, end, token, opened);
      multiply<T>(p, p.gated, p.gated_stride, row, end, token, gated);
      for (int t = 0; t < kDotTokens && token + t < p.batch; ++t) {
        for (int64_t r = 0; r < kDotRows; r += kLanes) {
          const int64_t count = min_of(kLanes, kDotRows - r);
          store_upto(opened[t] + r, silu(load_upto(opened[t] + r, count)), count);
        }
        for (int64_t r = 0; r < kDotRows && row + r < end; ++r) {
          y[(token + t) * p.y_stride + row + r] = from_acc<T>(to_acc(from_acc<T>(opened[t][r])) * gated[t][r]);
        }
      }
    }
  }
}

}  // namespace

extern const samba_decode_step::Kernels samba_decode_step;
const samba_decode_step::Kernels samba_decode_step = {
    {normalize<float>, normalize<bfloat16>, normalize<float16>, normalize<double>},
    {form_decay<float>, form_decay<float>, form_decay<float>, form_decay<double>},
    {multiply_store<float>, multiply_store<bfloat16>, multiply_store<float16>, multiply_store<double>},
    {multiply_add_to<float>, multiply_add_to<bfloat16>, multiply_add_to<float16>, multiply_add_to<double>},
    {multiply_gate<float>, multiply_gate<bfloat16>, multiply_gate<float16>, multiply_gate<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
