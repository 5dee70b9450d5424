// One position of the scan per row, from and into the state: h = exp(dt A) h + dt x B, y = C h + D x, gated by z. Vectors run
// along the N contiguous states of a channel, so the state is read and written once, in order; bound by its memory traffic, or by
// the exponentials when it lies in the cache. The output is formed from the new state before that is rounded to its own type.
#include "ops/selective_scan/cpu/exponential.h"
#include "ops/selective_scan/cpu/kernels.h"
#include "ops/selective_scan/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using selective_scan::kMaxState;
using selective_scan::kUpdateBlock;
using selective_scan::Parameter;
using selective_scan::UpdateParams;

// What one block of channels needs besides the state, in the accumulation type.
template <class A>
struct Inputs {
  A step[kUpdateBlock];  // dt * log2(e): the exponent is this times A
  A in[kUpdateBlock];    // dt * x
  A x[kUpdateBlock], z[kUpdateBlock];
  A b[kMaxState], c[kMaxState];
  A products[(kUpdateBlock + kChannelAlign) * lanes_of<A>];  // one vector of C h per channel
  A sums[kUpdateBlock + kChannelAlign];
};

template <class T>
void load_channels(const Activation& x, int64_t row, int64_t dim, int64_t count, acc_t<T>* to) {
  const T* from = static_cast<const T*>(x.data) + row * x.batch_stride + dim * x.dim_stride;
  constexpr int64_t kLanes = lanes_of<T>;
  if (x.dim_stride == 1) {
    for (int64_t c = 0; c < count; c += kLanes) store(to + c, load_upto(from + c, count - c));
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = to_acc(from[c * x.dim_stride]);
  }
}

template <class E, class A>
FASTLM_INLINE void load_elements(const void* data, int64_t stride, int64_t dim, int64_t count, A* to) {
  const E* from = static_cast<const E*>(data) + dim * stride;
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<A>(to_acc(from[c]));
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<A>(to_acc(from[c * stride]));
  }
}

// A parameter (D,); its dtype is looked at once, not per channel.
template <class A>
void load_parameter(const Parameter& x, int64_t dim, int64_t count, A* to) {
  switch (x.dtype) {
    case DType::kFloat32:
      return load_elements<float>(x.data, x.dim_stride, dim, count, to);
    case DType::kBFloat16:
      return load_elements<bfloat16>(x.data, x.dim_stride, dim, count, to);
    case DType::kFloat16:
      return load_elements<float16>(x.data, x.dim_stride, dim, count, to);
    case DType::kFloat64:
      return load_elements<double>(x.data, x.dim_stride, dim, count, to);
  }
}

template <class T>
void load_inputs(const UpdateParams& p, int64_t row, int64_t dim, int64_t count, Inputs<acc_t<T>>& in) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  for (int64_t c = 0; c < kUpdateBlock; ++c) in.step[c] = in.x[c] = A(0);
  load_channels<T>(p.x, row, dim, count, in.x);
  load_channels<T>(p.dt, row, dim, count, in.step);
  if (p.z.data != nullptr) load_channels<T>(p.z, row, dim, count, in.z);
  if (p.dt_bias.data != nullptr) {
    load_parameter(p.dt_bias, dim, count, in.in);
    for (int64_t c = 0; c < count; ++c) in.step[c] += in.in[c];
  }
  for (int64_t c = 0; c < count; c += kLanes) {
    V step = load(in.step + c);
    if (p.dt_softplus) step = step_softplus(step);
    store(in.in + c, step * load(in.x + c));
    store(in.step + c, step * A(1.4426950408889634));
  }
}

template <class T>
void load_vector(const Projection& x, int64_t row, int64_t group, int64_t state, acc_t<T>* to) {
  const T* from = static_cast<const T*>(x.data) + row * x.batch_stride + group * x.group_stride;
  for (int64_t n = 0; n < state; ++n) to[n] = to_acc(from[n * x.state_stride]);
}

// One vector of states: h is replaced, C h added to `sum`.
template <class V>
FASTLM_INLINE V step_states(V h, V a, V step, V in, V b, V c, V* sum) {
  V decay[1] = {step * a};
  exp2_each<false, 1>(decay);
  h = fma(decay[0], h, in * b);
  *sum = fma(c, h, *sum);
  return h;
}

// A channel whose state and A are contiguous.
template <class S, class A>
FASTLM_INLINE void update_contiguous(S* h, const A* a, int64_t state, A step, A in, const A* b, const A* c, A* product) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  const V steps = broadcast<V>(step), ins = broadcast<V>(in);
  V sum = zero<V>();
  int64_t n = 0;
  for (; n + kLanes <= state; n += kLanes) {
    store(h + n, step_states(load(h + n), load(a + n), steps, ins, load(b + n), load(c + n), &sum));
  }
  if (n < state) {
    const int64_t rest = state - n;
    const V last = step_states(load_partial(h + n, rest), load_partial(a + n, rest), steps, ins, load_partial(b + n, rest),
                               load_partial(c + n, rest), &sum);
    store_partial(h + n, last, rest);
  }
  store(product, sum);
}

// `S`: element type of the state; rows of any stride go through two small buffers.
template <class T, class S>
void update_block(const UpdateParams& p, int64_t row, int64_t slot, int64_t dim, int64_t count, Inputs<acc_t<T>>& in) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  load_inputs<T>(p, row, dim, count, in);
  const bool plain = p.A.dtype == DTypeOf<A>::value && p.A.state_stride == 1 && p.state_state_stride == 1;
  const int64_t dim_b = p.dim / p.B.groups, dim_c = p.dim / p.C.groups;  // channels per group
  S* const rows = static_cast<S*>(p.state_data) + slot * p.state_batch_stride;
  for (int64_t c = 0; c < count;) {
    // Channels up to the next border of a group share B and C; no division per channel.
    const int64_t group_b = (dim + c) / dim_b, group_c = (dim + c) / dim_c;
    const int64_t end = min_of(count, min_of((group_b + 1) * dim_b, (group_c + 1) * dim_c) - dim);
    load_vector<T>(p.B, row, group_b, p.state, in.b);
    load_vector<T>(p.C, row, group_c, p.state, in.c);
    for (; c < end; ++c) {
      const int64_t d = dim + c;
      S* h = rows + d * p.state_dim_stride;
      A* product = in.products + c * kLanes;
      if (plain) {
        const A* a = static_cast<const A*>(p.A.data) + d * p.A.dim_stride;
        update_contiguous(h, a, p.state, in.step[c], in.in[c], in.b, in.c, product);
        continue;
      }
      A a_row[kMaxState];
      S h_row[kMaxState];
      for (int64_t n = 0; n < p.state; ++n) {
        a_row[n] = load_param<A>(p.A.data, p.A.dtype, d * p.A.dim_stride + n * p.A.state_stride);
        h_row[n] = h[n * p.state_state_stride];
      }
      update_contiguous(h_row, a_row, p.state, in.step[c], in.in[c], in.b, in.c, product);
      for (int64_t n = 0; n < p.state; ++n) h[n * p.state_state_stride] = h_row[n];
    }
  }
  for (int64_t i = count * kLanes; i < ceil_div(count, kLanes) * kLanes * kLanes; ++i) in.products[i] = A(0);
  sum_lanes(in.products, count, in.sums);
  if (p.D.data != nullptr) {
    load_parameter(p.D, dim, count, in.step);  // the steps are used up
    for (int64_t c = 0; c < count; ++c) in.sums[c] += in.step[c] * in.x[c];
  }
  T* out = static_cast<T*>(p.out.data) + row * p.out.batch_stride + dim;
  for (int64_t c = 0; c < count; c += kLanes) {
    V y = load(in.sums + c);
    if (p.z.data != nullptr) {
      const V z = load_upto(in.z + c, count - c);
      y = y * (z * gate_sigmoid(z));
    }
    store_upto(out + c, y, count - c);
  }
}

template <class T>
void update(const UpdateParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  // On the stack: asking for memory could fail, with the state of some rows already written.
  alignas(64) Inputs<A> in;
  const int64_t blocks = ceil_div(p.dim, kUpdateBlock);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks;
    const int64_t dim = item % blocks * kUpdateBlock;
    const int64_t count = min_of(kUpdateBlock, p.dim - dim);
    const int64_t slot = p.state_batch_indices == nullptr ? row : p.state_batch_indices[row];
    if (slot < 0) {
      T* out = static_cast<T*>(p.out.data) + row * p.out.batch_stride + dim;
      for (int64_t c = 0; c < count; ++c) out[c] = from_acc<T>(A(0));
      continue;
    }
    if constexpr (sizeof(A) == sizeof(double)) {
      update_block<T, double>(p, row, slot, dim, count, in);
    } else if (p.state_dtype == DType::kBFloat16) {
      update_block<T, bfloat16>(p, row, slot, dim, count, in);
    } else if (p.state_dtype == DType::kFloat16) {
      update_block<T, float16>(p, row, slot, dim, count, in);
    } else {
      update_block<T, float>(p, row, slot, dim, count, in);
    }
  }
}

}  // namespace

extern const selective_scan::UpdateKernels selective_scan_update;
const selective_scan::UpdateKernels selective_scan_update = {
    {update<float>, update<bfloat16>, update<float16>, update<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
