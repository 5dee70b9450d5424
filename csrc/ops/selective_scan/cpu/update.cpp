// One position of the scan per row, from and into the state: h = exp(dt A) h + dt x B, y = C h + D x, gated by z. Vectors run
// along the N contiguous states of a channel, so the state is read and written once, in order; bound by its memory traffic, or by
// the exponentials when it lies in the cache. The output is formed from the new state before that is rounded to its own type.
#include "core/simd/lane_sums.h"
#include "ops/selective_scan/cpu/exponential.h"
#include "ops/selective_scan/cpu/kernels.h"
#include "ops/selective_scan/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using selective_scan::kMaxState;
using selective_scan::kUpdateBlock;
using selective_scan::Parameter;
using selective_scan::UpdateParams;

// Channels that are updated together: their exponentials overlap, and what they share is loaded once.
constexpr int kTogether = 4;
constexpr int kSummed = 8;  // and whose products with C are summed together

// What one block of channels needs besides the state, in the accumulation type.
template <class A>
struct Inputs {
  A step[kUpdateBlock];  // dt * log2(e): the exponent is this times A
  A in[kUpdateBlock];    // dt * x
  A x[kUpdateBlock], z[kUpdateBlock];
  A b[kMaxState + lanes_of<A>], c[kMaxState + lanes_of<A>];
  A sums[kUpdateBlock + kSummed];  // C h
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
    load_params(p.dt_bias.data, p.dt_bias.dtype, p.dt_bias.dim_stride, dim, count, in.in);
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
  if (x.state_stride == 1) {
    for (int64_t n = 0; n < state; n += lanes_of<T>) store(to + n, load_upto(from + n, state - n));
  } else {
    for (int64_t n = 0; n < state; ++n) to[n] = to_acc(from[n * x.state_stride]);
  }
}

// One vector of states of kCount channels: h is replaced, C h added to `sum`.
template <int kCount, class V>
FASTLM_INLINE void step_states(V* h, const V* a, const V* step, const V* in, V b, V c, V* sum) {
  V decay[kCount];
  for (int i = 0; i < kCount; ++i) decay[i] = step[i] * a[i];
  exp2_each<false, kCount>(decay);
  for (int i = 0; i < kCount; ++i) h[i] = fma(decay[i], h[i], in[i] * b);
  for (int i = 0; i < kCount; ++i) sum[i] = fma(c, h[i], sum[i]);
}

// Channels whose states and rows of A are contiguous: where they lie, and what they do not share.
template <class S, class A>
struct Channels {
  S* h;
  int64_t h_stride;
  const A* a;
  int64_t a_stride;
  const A *step, *in;
  A* sums;  // C h is added to them; up to kSummed - 1 behind the last one are touched
};

// kCount of them, from channel `first` on. kVectors: as many as N fills exactly, or 0: any N.
template <int kCount, int kVectors, class S, class A>
FASTLM_INLINE void update_together(const Channels<S, A>& p, int64_t first, int64_t state, const A* b, const A* c, vec_t<A>* sum) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  S* const h = p.h + first * p.h_stride;
  const A* const a = p.a + first * p.a_stride;
  V steps[kCount], ins[kCount], h_now[kCount], a_now[kCount];
  for (int i = 0; i < kCount; ++i) {
    steps[i] = broadcast<V>(p.step[first + i]);
    ins[i] = broadcast<V>(p.in[first + i]);
  }
  int64_t n = 0;
  if (kVectors > 0) state = kVectors * kLanes;
  for (; n + kLanes <= state; n += kLanes) {
    for (int i = 0; i < kCount; ++i) {
      h_now[i] = load(h + i * p.h_stride + n);
      a_now[i] = load(a + i * p.a_stride + n);
    }
    step_states<kCount>(h_now, a_now, steps, ins, load(b + n), load(c + n), sum);
    for (int i = 0; i < kCount; ++i) store(h + i * p.h_stride + n, h_now[i]);
  }
  if (kVectors == 0 && n < state) {
    const int64_t rest = state - n;
    for (int i = 0; i < kCount; ++i) {
      h_now[i] = load_partial(h + i * p.h_stride + n, rest);
      a_now[i] = load_partial(a + i * p.a_stride + n, rest);
    }
    step_states<kCount>(h_now, a_now, steps, ins, load_partial(b + n, rest), load_partial(c + n, rest), sum);
    for (int i = 0; i < kCount; ++i) store_partial(h + i * p.h_stride + n, h_now[i], rest);
  }
}

// `count` of them. Not inlined: with the rest of the block in one function, constants and steps do not stay in registers.
template <int kVectors, class S, class A>
__attribute__((noinline)) void update_contiguous(const Channels<S, A>& p, int64_t count, int64_t state, const A* b, const A* c) {
  for (int64_t i = 0; i < count; i += kSummed) {
    vec_t<A> sum[kSummed] = {};
    const int64_t here = min_of(count - i, kSummed);
    if (here == kSummed) {
#pragma GCC unroll 8
      for (int j = 0; j < kSummed; j += kTogether) update_together<kTogether, kVectors>(p, i + j, state, b, c, sum + j);
    } else {
      for (int64_t j = 0; j < here; ++j) update_together<1, kVectors>(p, i + j, state, b, c, sum + j);
    }
    add_lane_sums(sum, p.sums + i);
  }
}

template <class S, class A>
void update_channels(const Channels<S, A>& p, int64_t count, int64_t state, const A* b, const A* c) {
  constexpr int kUsual = 16 / lanes_of<A>;  // N = 16
  state == 16 ? update_contiguous<kUsual>(p, count, state, b, c) : update_contiguous<0>(p, count, state, b, c);
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
  for (int64_t c = 0; c < kUpdateBlock + kSummed; ++c) in.sums[c] = A(0);
  S* const rows = static_cast<S*>(p.state_data) + slot * p.state_batch_stride;
  for (int64_t c = 0; c < count;) {
    // Channels up to the next border of a group share B and C; no division per channel.
    const int64_t group_b = (dim + c) / dim_b, group_c = (dim + c) / dim_c;
    const int64_t end = min_of(count, min_of((group_b + 1) * dim_b, (group_c + 1) * dim_c) - dim);
    load_vector<T>(p.B, row, group_b, p.state, in.b);
    load_vector<T>(p.C, row, group_c, p.state, in.c);
    S* const h = rows + dim * p.state_dim_stride;
    if (plain) {
      const int64_t hs = p.state_dim_stride, as = p.A.dim_stride;
      const A* a = static_cast<const A*>(p.A.data) + dim * as;
      update_channels<S, A>({h + c * hs, hs, a + c * as, as, in.step + c, in.in + c, in.sums + c}, end - c, p.state, in.b, in.c);
      c = end;
    }
    for (; c < end; ++c) {
      A a_row[kMaxState];
      S h_row[kMaxState];
      S* const from = h + c * p.state_dim_stride;
      for (int64_t n = 0; n < p.state; ++n) {
        a_row[n] = load_param<A>(p.A.data, p.A.dtype, (dim + c) * p.A.dim_stride + n * p.A.state_stride);
        h_row[n] = from[n * p.state_state_stride];
      }
      update_channels<S, A>({h_row, 0, a_row, 0, in.step + c, in.in + c, in.sums + c}, 1, p.state, in.b, in.c);
      for (int64_t n = 0; n < p.state; ++n) from[n * p.state_state_stride] = h_row[n];
    }
  }
  if (p.D.data != nullptr) {
    load_params(p.D.data, p.D.dtype, p.D.dim_stride, dim, count, in.step);  // the steps are used up
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
