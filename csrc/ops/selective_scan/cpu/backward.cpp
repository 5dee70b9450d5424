// Selective scan, backward. With dy_t = dout_t silu(z_t) and lambda_t the gradient of the state after position t:
//   lambda_t = C_t dy_t + a_{t+1} lambda_{t+1},   a_t = exp(dt_t A),   lambda beyond the end: gradient of the last state
//   du = D dy + dt sum_n lambda B            ddt = sum_n lambda (B u + A a_t h_{t-1})        dA = sum_t lambda dt a_t h_{t-1}
//   dB = sum_channels lambda dt u            dC = sum_channels dy h                          dD = sum_t dy u
// and a_0 lambda_0 for the initial state. a_t h_{t-1} is formed as that product: the difference h_t - dt B u would cancel when a
// is small. Chunks are visited from the last to the first; for each vector of channels and kStateGroup states, one sweep forward
// from the chunk's stored state puts a and h on a tape in the first-level cache, one sweep back reads it.
// Every sum has a fixed order: dB and dC over the channels of a block, then over blocks; parameters over a slice of sequences,
// then over slices.
#include "core/scratch.h"
#include "ops/selective_scan/cpu/kernels.h"
#include "ops/selective_scan/cpu/sweep.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using selective_scan::BackwardParams;
using selective_scan::BackwardWork;
using selective_scan::ChannelArrays;
using selective_scan::Sequence;

// Scratch of one thread, in elements of the accumulation type.
template <class A>
struct Scratch {
  A* tiles;  // kNumTiles tiles of a strip; null: no memory
  A* h;      // (strip / lanes, padded_state, lanes): state at the chunk's start
  A* carry;  // (block / lanes, padded_state, lanes): a_{t+1} lambda_{t+1}
  A *b, *c;  // (kChunk, padded_state)
  A* sums;   // (kChunk, groups of states, kSumsRow): dB and dC over the channels of the block
  A* tape;   // (kChunk + 1, kTapeRow, lanes)

  explicit Scratch(const Plan& plan) {
    const int64_t rows = kChunk * plan.padded_state;
    const int64_t tape_size = (kChunk + 1) * kTapeRow * lanes_of<A>;
    const int64_t total = kNumTiles * kTile<A> + (kStrip + plan.block) * plan.padded_state + 4 * rows + tape_size;
    tiles = static_cast<A*>(thread_scratch(sizeof(A) * static_cast<size_t>(total)));
    if (tiles == nullptr) return;
    h = tiles + kNumTiles * kTile<A>;
    carry = h + kStrip * plan.padded_state;
    b = carry + plan.block * plan.padded_state;
    c = b + rows;
    sums = c + rows;
    tape = sums + 2 * rows;
  }
};

// ---- before and after the sweeps ----------------------------------------------------------------------------------

// One vector of channels of a strip, its place in the first tile given. Raw values become what the sweeps and finish_vector need.
// Returns whether every exponent is in the range that needs no clamping.
template <class A>
bool stage_vector(A* tile, int64_t length, bool softplus, bool gate, const A* bias_ptr, const A* bound_ptr) {
  using V = vec_t<A>;
  const V bias = load(bias_ptr), bound = load(bound_ptr);
  V longest = zero<V>();
  for (int64_t t = 0; t < length; ++t, tile += lanes_of<A>) {
    V step = load(tile + kStep * kTile<A>) + bias;
    V slope = broadcast<V>(A(1));
    if (softplus) step = step_softplus(step, &slope);
    store(tile + kStep * kTile<A>, step);
    store(tile + kSlope * kTile<A>, slope);
    store(tile + kStepIn * kTile<A>, step * load(tile + kInput * kTile<A>));
    longest = max(absolute(step), longest);
    store(tile + kSumB * kTile<A>, zero<V>());
    store(tile + kSumDecay * kTile<A>, zero<V>());
    if (gate) {
      const V dout = load(tile + kGrad * kTile<A>), z = load(tile + kGateGrad * kTile<A>), sigma = gate_sigmoid(z);
      store(tile + kGrad * kTile<A>, dout * (z * sigma));
      store(tile + kGateGrad * kTile<A>, dout * (sigma * (A(1) + z * (A(1) - sigma))));
      store(tile + kOutput * kTile<A>, zero<V>());
    }
  }
  return all_lanes(longest <= bound);
}

// Turns the sums of the sweeps into du, ddelta and dz; adds to the gradients of D and the bias.
template <class A>
void finish_vector(A* tile, int64_t length, bool gate, const A* skip_ptr, A* dskip_ptr, A* dbias_ptr) {
  using V = vec_t<A>;
  const V skip = load(skip_ptr);
  V dskip = load(dskip_ptr), dbias = load(dbias_ptr);
  for (int64_t t = 0; t < length; ++t, tile += lanes_of<A>) {
    const V sum_b = load(tile + kSumB * kTile<A>), dy = load(tile + kGrad * kTile<A>), u = load(tile + kInput * kTile<A>);
    // decay is A log2(e): ln 2 turns the sum back into one over A.
    const V ddt = fma(u, sum_b, A(0.6931471805599453) * load(tile + kSumDecay * kTile<A>));
    const V ddelta = ddt * load(tile + kSlope * kTile<A>);
    store(tile + kSumB * kTile<A>, fma(skip, dy, load(tile + kStep * kTile<A>) * sum_b));
    store(tile + kSumDecay * kTile<A>, ddelta);
    dskip = fma(dy, u, dskip);
    dbias += ddelta;
    if (gate) {
      const V y = fma(skip, u, load(tile + kOutput * kTile<A>));
      store(tile + kOutput * kTile<A>, load(tile + kGateGrad * kTile<A>) * y);
    }
  }
  store(dskip_ptr, dskip);
  store(dbias_ptr, dbias);
}

// States of `count` channels from (row, D, N) memory with these strides.
template <class A>
void gather_states(const void* data, DType dtype, int64_t dim_stride, int64_t state_stride, const Plan& plan, int64_t state,
                   int64_t offset, int64_t count, A* to) {
  constexpr int64_t kLanes = lanes_of<A>;
  if (data == nullptr) {
    for (int64_t i = 0; i < ceil_div(count, kLanes) * kLanes * plan.padded_state; ++i) to[i] = A(0);
    return;
  }
  for (int64_t c = 0; c < ceil_div(count, kLanes) * kLanes; ++c) {
    for (int64_t n = 0; n < plan.padded_state; ++n) {
      const bool real = c < count && n < state;
      to[(c / kLanes * plan.padded_state + n) * kLanes + c % kLanes] =
          real ? load_param<A>(data, dtype, offset + c * dim_stride + n * state_stride) : A(0);
    }
  }
}

// State of `count` channels from `dim` on at the start of chunk number k of a sequence.
template <class A>
void load_start(const BackwardParams& p, const Plan& plan, const Sequence& s, int64_t row, int64_t k, int64_t dim, int64_t count,
                A* h) {
  constexpr int64_t kLanes = lanes_of<A>;
  if (k == 0) {
    gather_states(p.initial_state, p.initial_dtype, p.initial_dim_stride, p.initial_state_stride, plan, p.state,
                  row * p.initial_batch_stride + dim * p.initial_dim_stride, count, h);
    return;
  }
  const A* from = static_cast<const A*>(p.chunk_states) + (s.chunk_begin + k - 1) * p.state * p.dim + dim;
  for (int64_t c = 0; c < count; c += kLanes) {
    for (int64_t n = 0; n < plan.padded_state; ++n) {
      const vec_t<A> v = n < p.state ? load_upto(from + n * p.dim + c, count - c) : zero<vec_t<A>>();
      store(h + c * plan.padded_state + n * kLanes, v);
    }
  }
}

template <class T>
void strip_backward(const BackwardParams& p, const Plan& plan, const ChannelArrays& arrays, const acc_t<T>* prepared,
                    acc_t<T>* partial, const Sequence& s, const Block& block, int64_t first, int64_t count, int64_t t0,
                    int64_t length, const Ahead<T>& ahead, const Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t groups = plan.padded_state / kStateGroup;
  const int64_t dim = block.dim + first;
  const bool gate = p.z.data != nullptr;
  const auto tile = [&](Tile which) { return scratch.tiles + which * kTile<A>; };
  load_tile<T>(p.delta, s.batch, t0, length, dim, count, tile(kStep));
  load_tile<T>(p.u, s.batch, t0, length, dim, count, tile(kInput));
  load_tile<T>(p.dout, s.batch, t0, length, dim, count, tile(kGrad));
  if (gate) load_tile<T>(p.z, s.batch, t0, length, dim, count, tile(kGateGrad));
  Sweep<A> sweep;
  sweep.length = length;
  sweep.padded_state = plan.padded_state;
  sweep.sums_stride = 2 * plan.padded_state;
  sweep.tape = scratch.tape;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t channel = block.array + first + c;
    sweep.tile = scratch.tiles + c / kLanes * kPitch<A>;
    const bool in_range = stage_vector(sweep.tile, length, p.delta_softplus, gate, prepared + arrays.bias + channel,
                                       prepared + arrays.bound + channel);
    const SweepFunction<A> forward = choose_forward<A>(in_range, p.B.constant);
    const SweepFunction<A> back = choose_back<A>(p.B.constant, p.C.constant, gate);
    for (int64_t n = 0; n < plan.padded_state; n += kStateGroup) {
      ahead.ask(c / kLanes * groups + n / kStateGroup, ceil_div(count, kLanes) * groups);
      const int64_t pair = channel * plan.padded_state + n * kLanes;
      sweep.decay = prepared + arrays.decay + pair;
      sweep.b = p.B.constant ? prepared + arrays.b + pair : scratch.b + n;
      sweep.c = p.C.constant ? prepared + arrays.c + pair : scratch.c + n;
      sweep.h = scratch.h + c * plan.padded_state + n * kLanes;
      sweep.carry = scratch.carry + (first + c) * plan.padded_state + n * kLanes;
      sweep.da = partial + arrays.decay + pair;
      sweep.db = partial + arrays.b + pair;
      sweep.dc = partial + arrays.c + pair;
      sweep.sums = scratch.sums + 2 * n;
      forward(sweep);
      back(sweep);
    }
    finish_vector(sweep.tile, length, gate, prepared + arrays.skip + channel, partial + arrays.skip + channel,
                  partial + arrays.bias + channel);
  }
  store_tile<T>(p.du, s.batch, t0, length, dim, count, tile(kSumB));
  store_tile<T>(p.ddelta, s.batch, t0, length, dim, count, tile(kSumDecay));
  if (gate) store_tile<T>(p.dz, s.batch, t0, length, dim, count, tile(kOutput));
}

template <class A>
A* position_partial(const BackwardParams& p, const Plan& plan, const BackwardWork& work, int64_t block, int which,
                    int64_t position) {
  return static_cast<A*>(work.position_partial) + ((block * 2 + which) * p.batch * p.seqlen + position) * plan.padded_state;
}

template <class T>
void sequence_backward(const BackwardParams& p, const Plan& plan, const ChannelArrays& arrays, const acc_t<T>* prepared,
                       acc_t<T>* partial, const BackwardWork& work, int64_t row, int64_t block_index,
                       const Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const Sequence& s = p.sequences[row];
  const Block block = block_of(plan, block_index);
  const int64_t states = (row * p.dim + block.dim) * p.state;
  gather_states(p.dlast_state, DTypeOf<A>::value, p.state, 1, plan, p.state, states, block.count, scratch.carry);
  for (int64_t k = ceil_div(s.end - s.begin, kChunk) - 1; k >= 0; --k) {
    const int64_t t0 = s.begin + k * kChunk;
    const int64_t length = min_of(kChunk, s.end - t0);
    if (!p.B.constant) {
      load_projection<T>(p.B, p.state, plan.padded_state, s.batch, block.group * p.B.groups / p.groups, t0, length, scratch.b);
    }
    if (!p.C.constant) {
      load_projection<T>(p.C, p.state, plan.padded_state, s.batch, block.group * p.C.groups / p.groups, t0, length, scratch.c);
    }
    for (int64_t i = 0; i < 2 * length * plan.padded_state; ++i) scratch.sums[i] = A(0);
    const Activation* const tensors[] = {&p.delta, &p.u, &p.dout, &p.z, &p.du, &p.ddelta, &p.dz, nullptr};
    for (int64_t first = 0; first < block.count; first += kStrip) {
      const int64_t count = min_of(kStrip, block.count - first);
      const auto ahead = strip_ahead<T>(tensors, s.batch, block, first, t0, length, t0 - kChunk, k > 0 ? kChunk : 0);
      load_start(p, plan, s, row, k, block.dim + first, count, scratch.h);
      strip_backward<T>(p, plan, arrays, prepared, partial, s, block, first, count, t0, length, ahead, scratch);
    }
    const int64_t position = s.batch * p.seqlen + t0;
    for (int which = 0; which < 2; ++which) {
      A* to = position_partial<A>(p, plan, work, block_index, which, position);
      const A* from = scratch.sums + which * kStateGroup;
      for (int64_t i = 0; i < length * plan.padded_state; i += kStateGroup) {
        __builtin_memcpy(to + i, from + 2 * i, kStateGroup * sizeof(A));
      }
    }
  }
  if (p.dinitial_state == nullptr) return;
  A* to = static_cast<A*>(p.dinitial_state) + states;
  for (int64_t c = 0; c < block.count; ++c) {
    for (int64_t n = 0; n < p.state; ++n) {
      to[c * p.state + n] = scratch.carry[(c / kLanes * plan.padded_state + n) * kLanes + c % kLanes];
    }
  }
}

template <class T>
void backward(const BackwardParams& p, const Plan& plan, const ChannelArrays& arrays, const void* prepared,
              const BackwardWork& work, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Scratch<A> scratch(plan);
  if (scratch.tiles == nullptr) return;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t slice = item / plan.num_blocks;
    const int64_t block_index = item % plan.num_blocks;
    A* partial = static_cast<A*>(work.channel_partial) + slice * arrays.total;
    const Block block = block_of(plan, block_index);
    const int64_t padded = ceil_div(block.count, kChannelAlign) * kChannelAlign;
    const auto clear = [](A* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i) from[i] = A(0);
    };
    clear(partial + arrays.decay + block.array * plan.padded_state, padded * plan.padded_state);
    clear(partial + arrays.bias + block.array, padded);
    clear(partial + arrays.skip + block.array, padded);
    if (p.B.constant) clear(partial + arrays.b + block.array * plan.padded_state, padded * plan.padded_state);
    if (p.C.constant) clear(partial + arrays.c + block.array * plan.padded_state, padded * plan.padded_state);
    for (int64_t row = work.slice_begin[slice]; row < work.slice_begin[slice + 1]; ++row) {
      sequence_backward<T>(p, plan, arrays, static_cast<const A*>(prepared), partial, work, row, block_index, scratch);
    }
  }
}

// ---- sums over blocks and slices ----------------------------------------------------------------------------------

template <class T>
void reduce_positions(const BackwardParams& p, const Plan& plan, const BackwardWork& work, int which, const Projection& grad,
                      int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t blocks = plan.num_blocks / grad.groups;
  for (int64_t position = begin; position < end; ++position) {
    for (int64_t group = 0; group < grad.groups; ++group) {
      T* to = static_cast<T*>(const_cast<void*>(grad.data)) + position / p.seqlen * grad.batch_stride +
              position % p.seqlen * grad.seq_stride + group * grad.group_stride;
      for (int64_t n = 0; n < p.state; n += kLanes) {
        V sum = zero<V>();
        for (int64_t block = group * blocks; block < (group + 1) * blocks; ++block) {
          sum += load_upto(position_partial<A>(p, plan, work, block, which, position) + n, p.state - n);
        }
        if (grad.state_stride == 1) {
          store_upto(to + n, sum, p.state - n);
        } else {
          for (int64_t i = 0; i < kLanes && n + i < p.state; ++i) to[(n + i) * grad.state_stride] = from_acc<T>(sum[i]);
        }
      }
    }
  }
}

template <class T>
void reduce_channels(const BackwardParams&, const Plan& plan, const ChannelArrays& arrays, const BackwardWork& work,
                     int64_t array, int64_t states, void* grad_ptr, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const A* partial = static_cast<const A*>(work.channel_partial) + array;
  A* grad = static_cast<A*>(grad_ptr);
  for (int64_t d = begin; d < end; ++d) {
    const int64_t c = d / plan.group_dim * plan.padded_dim + d % plan.group_dim;
    for (int64_t n = 0; n < (states > 0 ? states : 1); ++n) {
      const int64_t at = states > 0 ? (c / kLanes * plan.padded_state + n) * kLanes + c % kLanes : c;
      A sum = A(0);
      for (int64_t slice = 0; slice < work.num_slices; ++slice) sum += partial[slice * arrays.total + at];
      grad[states > 0 ? d * states + n : d] = sum;
    }
  }
}

}  // namespace

extern const selective_scan::BackwardKernels selective_scan_backward;
const selective_scan::BackwardKernels selective_scan_backward = {
    {backward<float>, backward<bfloat16>, backward<float16>, backward<double>},
    {reduce_positions<float>, reduce_positions<bfloat16>, reduce_positions<float16>, reduce_positions<double>},
    {reduce_channels<float>, reduce_channels<bfloat16>, reduce_channels<float16>, reduce_channels<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
