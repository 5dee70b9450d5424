// Selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t + D u_t, out_t = y_t silu(z_t), with
// dt = softplus(delta + bias) (Gu and Dao, arXiv 2312.00752). Bound by the exponentials: one per channel, state and position.
// Vectors run along channels. A tile of positions is staged into scratch; then, for each vector of channels, groups of
// kStateGroup states walk through the tile with h in registers, adding their part of y to scratch.
#include "core/scratch.h"
#include "ops/selective_scan/cpu/exponential.h"
#include "ops/selective_scan/cpu/kernels.h"
#include "ops/selective_scan/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using selective_scan::ChannelArrays;
using selective_scan::ForwardParams;
using selective_scan::Parameter;
using selective_scan::Params;
using selective_scan::Sequence;

// ---- parameters, once per call ------------------------------------------------------------------------------------

// A (D, N) parameter of kChannelAlign channels, times a factor.
template <class A>
void prepare_matrix(const Parameter& x, const Plan& plan, int64_t state, int64_t dim, int64_t count, A factor, A* to) {
  constexpr int64_t kLanes = lanes_of<A>;
  const bool plain = x.dtype == DTypeOf<A>::value && x.state_stride == 1;  // no look at the dtype per element
  for (int64_t c = 0; c < kChannelAlign; ++c) {
    A* lane = to + c / kLanes * plan.padded_state * kLanes + c % kLanes;
    const int64_t real = c < count ? state : 0;
    const int64_t row = (dim + c) * x.dim_stride;
    if (plain) {
      for (int64_t n = 0; n < real; ++n) lane[n * kLanes] = factor * static_cast<const A*>(x.data)[row + n];
    } else {
      for (int64_t n = 0; n < real; ++n) lane[n * kLanes] = factor * load_param<A>(x.data, x.dtype, row + n * x.state_stride);
    }
    for (int64_t n = real; n < plan.padded_state; ++n) lane[n * kLanes] = A(0);
  }
}

template <class T>
void prepare(const Params& p, const Plan& plan, const ChannelArrays& arrays, void* prepared, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  A* base = static_cast<A*>(prepared);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c0 = item * kChannelAlign;
    const int64_t first = c0 % plan.padded_dim;
    const int64_t dim = c0 / plan.padded_dim * plan.group_dim + first;
    const int64_t count = min_of(kChannelAlign, plan.group_dim - first);
    A* decay = base + arrays.decay + c0 * plan.padded_state;
    const auto constant = [](const Projection& x) { return Parameter{x.data, x.dtype, x.dim_stride, x.state_stride}; };
    const int64_t pair = c0 * plan.padded_state;
    prepare_matrix<A>(p.A, plan, p.state, dim, count, A(1.4426950408889634), decay);
    if (p.B.constant) prepare_matrix<A>(constant(p.B), plan, p.state, dim, count, A(1), base + arrays.b + pair);
    if (p.C.constant) prepare_matrix<A>(constant(p.C), plan, p.state, dim, count, A(1), base + arrays.c + pair);
    for (int64_t c = 0; c < kChannelAlign; ++c) {
      const bool real = c < count;
      A largest = A(0);
      for (int64_t n = 0; n < plan.padded_state; ++n) {
        const A a = decay[(c / kLanes * plan.padded_state + n) * kLanes + c % kLanes];
        const A size = a < A(0) ? -a : a;
        largest = size <= largest ? largest : size;
        if (a != a) {  // a NaN must not hide behind a later number
          largest = a;
          break;
        }
      }
      base[arrays.bound + c0 + c] = A(kExp2Range) / largest;
      base[arrays.bias + c0 + c] =
          real ? load_param<A>(p.delta_bias.data, p.delta_bias.dtype, (dim + c) * p.delta_bias.dim_stride) : A(0);
      base[arrays.skip + c0 + c] = real ? load_param<A>(p.D.data, p.D.dtype, (dim + c) * p.D.dim_stride) : A(0);
    }
  }
}

// ---- the scan -----------------------------------------------------------------------------------------------------

// kStateGroup states of one vector of channels through `length` positions. `b` and `c` point at the group's first state: rows of
// padded_state values, or, if constant, vectors of channels. kKeep: every state goes to `states` (length, kStateGroup, lanes).
template <class A, bool kInRange, bool kConstantB, bool kConstantC, bool kKeep>
void scan_states(int64_t length, const A* dt, const A* du, const A* decay, const A* b, const A* c, int64_t padded_state, A* h_ptr,
                 A* y, A* states) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  V h[kStateGroup];
  for (int64_t k = 0; k < kStateGroup; ++k) h[k] = load(h_ptr + k * kLanes);
  for (int64_t t = 0; t < length; ++t) {
    V sum = load(y + t * kLanes);
    for (int64_t k = 0; k < kStateGroup; k += 2) {
      V a[2], in[2];
      for (int i = 0; i < 2; ++i) a[i] = load(dt + t * kLanes) * load(decay + (k + i) * kLanes);
      exp2_each<kInRange, 2>(a);
      for (int i = 0; i < 2; ++i) {
        in[i] = load(du + t * kLanes) * (kConstantB ? load(b + (k + i) * kLanes) : broadcast<V>(b[t * padded_state + k + i]));
      }
      for (int i = 0; i < 2; ++i) h[k + i] = fma(a[i], h[k + i], in[i]);
      for (int i = 0; i < 2; ++i) {
        const V out = kConstantC ? load(c + (k + i) * kLanes) : broadcast<V>(c[t * padded_state + k + i]);
        sum = fma(h[k + i], out, sum);
        if (kKeep) store(states + (t * kStateGroup + k + i) * kLanes, h[k + i]);
      }
    }
    store(y + t * kLanes, sum);
  }
  for (int64_t k = 0; k < kStateGroup; ++k) store(h_ptr + k * kLanes, h[k]);
}

template <class A>
using ScanStates = void (*)(int64_t, const A*, const A*, const A*, const A*, const A*, int64_t, A*, A*, A*);

template <class A>
ScanStates<A> choose_scan(bool in_range, bool constant_b, bool constant_c, bool keep) {
  static constexpr ScanStates<A> kTable[16] = {
      scan_states<A, false, false, false, false>, scan_states<A, false, false, false, true>,
      scan_states<A, false, false, true, false>,  scan_states<A, false, false, true, true>,
      scan_states<A, false, true, false, false>,  scan_states<A, false, true, false, true>,
      scan_states<A, false, true, true, false>,   scan_states<A, false, true, true, true>,
      scan_states<A, true, false, false, false>,  scan_states<A, true, false, false, true>,
      scan_states<A, true, false, true, false>,   scan_states<A, true, false, true, true>,
      scan_states<A, true, true, false, false>,   scan_states<A, true, true, false, true>,
      scan_states<A, true, true, true, false>,    scan_states<A, true, true, true, true>,
  };
  return kTable[8 * in_range + 4 * constant_b + 2 * constant_c + keep];
}

// Scratch of one thread, in elements of the accumulation type.
template <class A>
struct Scratch {
  A *dt, *du, *y;  // tiles of a strip; dt null: no memory
  A* h;            // (block / lanes, padded_state, lanes)
  A *b, *c;        // (kChunk, padded_state)
  A* states;       // (kChunk, kStateGroup, lanes)

  explicit Scratch(const Plan& plan) {
    const int64_t tile = kStrip / lanes_of<A> * kPitch<A>;
    const int64_t rows = kChunk * plan.padded_state;
    const int64_t kept = kChunk * kStateGroup * lanes_of<A>;
    dt = static_cast<A*>(
        thread_scratch(sizeof(A) * static_cast<size_t>(3 * tile + plan.block * plan.padded_state + 2 * rows + kept)));
    if (dt == nullptr) return;
    du = dt + tile;
    y = du + tile;
    h = y + tile;
    b = h + plan.block * plan.padded_state;
    c = b + rows;
    states = c + rows;
  }
};

// One vector of channels of a staged tile: raw delta and u become dt and dt * u, y starts as D * u. Returns whether every
// exponent of the tile is in the range that needs no clamping.
template <class A>
bool stage_steps(int64_t length, bool softplus, const A* bias_ptr, const A* skip_ptr, const A* bound_ptr, A* dt, A* du, A* y) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  const V bias = load(bias_ptr), skip = load(skip_ptr), bound = load(bound_ptr);
  V longest = zero<V>();  // NaN may drop out: it reaches the state by dt * u
  for (int64_t t = 0; t < length; ++t) {
    V step = load(dt + t * kLanes) + bias;
    if (softplus) step = step_softplus(step);
    const V u = load(du + t * kLanes);
    longest = max(absolute(step), longest);
    store(dt + t * kLanes, step);
    store(du + t * kLanes, step * u);
    store(y + t * kLanes, skip * u);
  }
  return all_lanes(longest <= bound);
}

template <class T>
void load_state(const ForwardParams& p, const Plan& plan, int64_t row, const Block& block, acc_t<T>* h) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  for (int64_t i = 0; i < plan.block * plan.padded_state; ++i) h[i] = A(0);
  if (p.initial_state == nullptr) return;
  for (int64_t c = 0; c < block.count; ++c) {
    const int64_t offset = row * p.initial_batch_stride + (block.dim + c) * p.initial_dim_stride;
    for (int64_t n = 0; n < p.state; ++n) {
      h[(c / kLanes * plan.padded_state + n) * kLanes + c % kLanes] =
          load_param<A>(p.initial_state, p.initial_dtype, offset + n * p.initial_state_stride);
    }
  }
}

// The state of a block of channels as channel `lanes` see it, written to (N, D) memory: n * dim + d.
template <class A>
void store_chunk_state(const ForwardParams& p, const Plan& plan, int64_t chunk, const Block& block, const A* h) {
  constexpr int64_t kLanes = lanes_of<A>;
  A* to = static_cast<A*>(p.chunk_states) + chunk * p.state * p.dim + block.dim;
  for (int64_t c = 0; c < block.count; c += kLanes) {
    for (int64_t n = 0; n < p.state; ++n) {
      const vec_t<A> v = h == nullptr ? zero<vec_t<A>>() : load(h + c * plan.padded_state + n * kLanes);
      store_upto(to + n * p.dim + c, v, block.count - c);
    }
  }
}

// `count` channels of kept states, from state n0 on, to (position, D, N) memory.
template <class A>
void store_all_states(const ForwardParams& p, int64_t position, int64_t length, int64_t dim, int64_t count, int64_t n0,
                      const A* states) {
  constexpr int64_t kLanes = lanes_of<A>;
  const int64_t states_here = min_of(kStateGroup, p.state - n0);
  for (int64_t t = 0; t < length; ++t) {
    A* to = static_cast<A*>(p.all_states) + ((position + t) * p.dim + dim) * p.state + n0;
    for (int64_t c = 0; c < count && c < kLanes; ++c) {
      for (int64_t k = 0; k < states_here; ++k) to[c * p.state + k] = states[(t * kStateGroup + k) * kLanes + c];
    }
  }
}

// `count` channels of a tile, from channel `first` of the block on.
template <class T>
void scan_strip(const ForwardParams& p, const Plan& plan, const ChannelArrays& arrays, const acc_t<T>* prepared,
                const Sequence& s, const Block& block, int64_t first, int64_t count, int64_t t0, int64_t length,
                const Ahead<T>& ahead, const Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t dim = block.dim + first;
  const int64_t groups = plan.padded_state / kStateGroup;
  load_tile<T>(p.delta, s.batch, t0, length, dim, count, scratch.dt);
  load_tile<T>(p.u, s.batch, t0, length, dim, count, scratch.du);
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t tile = c / kLanes * kPitch<A>;
    const int64_t channel = block.array + first + c;
    A* dt = scratch.dt + tile;
    A* du = scratch.du + tile;
    A* y = scratch.y + tile;
    const bool in_range = stage_steps(length, p.delta_softplus, prepared + arrays.bias + channel,
                                      prepared + arrays.skip + channel, prepared + arrays.bound + channel, dt, du, y);
    const ScanStates<A> scan = choose_scan<A>(in_range, p.B.constant, p.C.constant, p.all_states != nullptr);
    for (int64_t n = 0; n < plan.padded_state; n += kStateGroup) {
      ahead.ask(c / kLanes * groups + n / kStateGroup, ceil_div(count, kLanes) * groups);
      const int64_t pair = channel * plan.padded_state + n * kLanes;
      scan(length, dt, du, prepared + arrays.decay + pair, p.B.constant ? prepared + arrays.b + pair : scratch.b + n,
           p.C.constant ? prepared + arrays.c + pair : scratch.c + n, plan.padded_state,
           scratch.h + (first + c) * plan.padded_state + n * kLanes, y, scratch.states);
      if (p.all_states != nullptr) {
        store_all_states(p, s.batch * p.seqlen + t0, length, dim + c, count - c, n, scratch.states);
      }
    }
  }
  if (p.z.data != nullptr) {
    load_tile<T>(p.z, s.batch, t0, length, dim, count, scratch.dt);
    for (int64_t c = 0; c < count; c += kLanes) {
      for (int64_t i = c / kLanes * kPitch<A>, last = i + length * kLanes; i < last; i += kLanes) {
        const vec_t<T> z = load(scratch.dt + i);
        store(scratch.y + i, load(scratch.y + i) * (z * gate_sigmoid(z)));
      }
    }
  }
  store_tile<T>(p.out, s.batch, t0, length, dim, count, scratch.y);
}

template <class T>
void scan_tile(const ForwardParams& p, const Plan& plan, const ChannelArrays& arrays, const acc_t<T>* prepared, const Sequence& s,
               const Block& block, int64_t t0, int64_t length, const Scratch<acc_t<T>>& scratch) {
  if (!p.B.constant) {
    load_projection<T>(p.B, p.state, plan.padded_state, s.batch, block.group * p.B.groups / p.groups, t0, length, scratch.b);
  }
  if (!p.C.constant) {
    load_projection<T>(p.C, p.state, plan.padded_state, s.batch, block.group * p.C.groups / p.groups, t0, length, scratch.c);
  }
  const Activation* const tensors[] = {&p.delta, &p.u, &p.z, &p.out, nullptr};
  const int64_t next = t0 + length;
  for (int64_t first = 0; first < block.count; first += kStrip) {
    const auto ahead = strip_ahead<T>(tensors, s.batch, block, first, t0, length, next, min_of(kChunk, s.end - next));
    scan_strip<T>(p, plan, arrays, prepared, s, block, first, min_of(kStrip, block.count - first), t0, length, ahead, scratch);
  }
}

template <class T>
void forward(const ForwardParams& p, const Plan& plan, const ChannelArrays& arrays, const void* prepared_ptr, int64_t begin,
             int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const A* prepared = static_cast<const A*>(prepared_ptr);
  const Scratch<A> scratch(plan);
  if (scratch.dt == nullptr) return;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / plan.num_blocks;
    const Sequence& s = p.sequences[row];
    const Block block = block_of(plan, item % plan.num_blocks);
    load_state<T>(p, plan, row, block, scratch.h);
    int64_t chunk = s.chunk_begin;
    for (int64_t t = s.begin; t < s.end; t += kChunk) {
      const int64_t length = min_of(kChunk, s.end - t);
      scan_tile<T>(p, plan, arrays, prepared, s, block, t, length, scratch);
      if (length == kChunk) store_chunk_state<A>(p, plan, chunk++, block, scratch.h);
    }
    while (chunk < s.chunk_end) store_chunk_state<A>(p, plan, chunk++, block, nullptr);

    A* last = static_cast<A*>(p.last_state) + (row * p.dim + block.dim) * p.state;
    for (int64_t c = 0; c < block.count; ++c) {
      for (int64_t n = 0; n < p.state; ++n) {
        last[c * p.state + n] = scratch.h[(c / kLanes * plan.padded_state + n) * kLanes + c % kLanes];
      }
    }
  }
}

}  // namespace

extern const selective_scan::ForwardKernels selective_scan_forward;
const selective_scan::ForwardKernels selective_scan_forward = {
    {prepare<float>, prepare<bfloat16>, prepare<float16>, prepare<double>},
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
