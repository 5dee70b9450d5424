// Mamba-1 selective scan on CUDA, backward; the formulas stand in cpu/backward.cpp.
//
// A team of 128 threads visits the chunks of kChunk positions of 32 channels from the last to the first: 4 neighbouring threads
// hold the states of one channel, 4 each, and the gradient of those states in registers. The states within a chunk are found
// again from the state stored at its start: a sweep forward keeps them at every eighth position (shared memory, 16 KiB); from
// each, last first, a sweep over 8 positions forms decays and states once more, onto a tape in registers, and one back reads the
// tape. That is 1.9 exponentials a state and position; a tape of the whole chunk would need one, but 256 KiB for a team.
//
// Sums over states (y, for dz; those of du and ddelta) go through shared memory from four lanes to one thread; sums over
// channels (dB, dC) likewise, first over the 8 channels of a warp, then over warps: 3 instructions a state and position instead
// of 7 by exchanging shuffles. Each block of 32 channels writes a row of sums for each position; backward_sums.cuh adds the
// blocks. 16 bits and N up to 16 take blocks of 64 channels where a block may have 112 KiB: backward_paired.cuh.
//
// More than 16 states are visited in groups of 16 within each chunk (kMany); gradients wait in memory for their group's turn.
// Where channels times sequences cannot fill a device, time is split (backward_ends.cuh).
//
// Bound by instruction issue and, nearly as much, by shared memory's bandwidth (half of it the terms of dB and dC); the
// special-function unit is busy half of the time. docs/cuda.md counts them.
#pragma once

#include "ops/selective_scan/cuda/backward_sweep.cuh"

namespace fastlm::selective_scan::cuda {

template <class Shape>
class BackwardTile {
  using T = typename Shape::T;
  using A = typename Shape::A;
  static constexpr int kThreads = Shape::kThreads, kChannels = Shape::kChannels, kStates = Shape::kStates, kPer = Shape::kPer;
  static constexpr int kSub = Shape::kSub, kSteps = Shape::kSteps;

 public:
  __device__ __forceinline__ BackwardTile(const Team<kThreads>& team, const BackwardCall& call, int64_t slice, int64_t block,
                                          char* shared)
      : team_(team),
        call_(call),
        p_(call.p),
        slice_(slice),
        block_(backward_block<Shape>(call.p, block)),
        shared_(shared),
        own_(call.p, block_, team.thread % kChannels),
        dskip_(0),
        dbias_(0) {
    lane_.channel = team.thread / Shape::kLanes;
    lane_.lane = team.thread % Shape::kLanes;
    lane_.pairs = at(Shape::kPairs) + lane_.channel * 2;
    lane_.B = at(Shape::kB) + lane_.lane * kPer;
    lane_.C = at(Shape::kC) + lane_.lane * kPer;
    lane_.dy = at(Shape::kDy) + lane_.channel;
    lane_.sums = at(Shape::kWork) + team.thread;
    lane_.place_terms(at(Shape::kWork + Shape::kLaneSums) + team.thread / 32 * (Shape::kWarpTerms / Shape::kSize));
    in_.place(team.thread, call, shared + Shape::kRing);
  }

  __device__ __forceinline__ void run() {
    if constexpr (Shape::kMany) {
      clear();
      for (int64_t n = 0; n < p_.state; n += kStates) exchange<true>(n);
    } else {
      load_parameters(0);
      clear();
    }
    const int64_t begin = call_.split.slots * slice_ / call_.slices, end = call_.split.slots * (slice_ + 1) / call_.slices;
#pragma unroll 1
    for (int64_t slot = begin; slot < end; ++slot) {
      const Part part = part_of(p_, call_.split, slot);
      if (part.number < 0) continue;
      number_ = part.number;
      sequence_ = part.sequence;
      if constexpr (Shape::kMany) {
        for (int64_t n = 0; n < p_.state; n += kStates) {
          exchange<false>(n);
          load_carry(slot, n, part.end == sequence_.end);
          exchange<true>(n);
        }
      } else {
        load_carry(slot, 0, part.end == sequence_.end);
      }
      const int64_t chunks = ceil_div(part.end - part.begin, kChunk);
#pragma unroll 1
      for (int64_t k = chunks - 1; k >= 0; --k) {
        const int64_t t0 = part.begin + k * kChunk;
        chunk({sequence_.batch, t0, static_cast<int>(min_of(kChunk, part.end - t0))});
      }
      if (p_.dinitial_state == nullptr || part.begin != sequence_.begin) continue;
      if constexpr (Shape::kMany) {
        for (int64_t n = 0; n < p_.state; n += kStates) {
          exchange<false>(n);
          store_carry(n);
        }
      } else {
        store_carry(0);
      }
    }
    if constexpr (Shape::kMany) {
      for (int64_t n = 0; n < p_.state; n += kStates) {
        exchange<false>(n);
        store_parameters(n);
      }
    } else {
      store_parameters(0);
    }
    store_channel_sums();
  }

 private:
  __device__ __forceinline__ A* at(int bytes) const { return reinterpret_cast<A*>(shared_ + bytes); }
  __device__ __forceinline__ bool there(int64_t n) const { return lane_.channel < block_.channels && n < p_.state; }
  __device__ __forceinline__ int64_t dim() const { return block_.channel + lane_.channel; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPer; ++i) lane_.carry[i] = lane_.dA[i] = lane_.dB[i] = lane_.dC[i] = A(0);
  }

  __device__ __forceinline__ void load_parameters(int64_t first) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t n = first + lane_.lane * kPer + i;
      // Rounded once: the error is that of every exponent of the channel.
      lane_.decay[i] = there(n)
                           ? static_cast<A>(kLog2e * fastlm::cuda::load_param<double>(
                                                         p_.A.data, p_.A.dtype, dim() * p_.A.dim_stride + n * p_.A.state_stride))
                           : A(0);
      if constexpr (!Shape::kPlain) {
        const auto constant = [&](const Projection& m) {
          return m.constant && there(n) ? fastlm::cuda::load_param<A>(m.data, m.dtype, dim() * m.dim_stride + n * m.state_stride)
                                        : A(0);
        };
        lane_.b_constant[i] = constant(p_.B);
        lane_.c_constant[i] = constant(p_.C);
      }
    }
  }

  // The sums of a group of states from (or to) where they wait.
  template <bool kStore>
  __device__ __forceinline__ void exchange(int64_t first) {
    A* const memory = static_cast<A*>(call_.carried) +
                      ((slice_ * Shape::blocks(p_) + block_.index) * call_.padded_state + first) * 4 * kChannels +
                      team_.thread * kPer;
    A(*const arrays[4])[kPer] = {&lane_.carry, &lane_.dA, &lane_.dB, &lane_.dC};
#pragma unroll
    for (int i = 0; i < (Shape::kPlain ? 2 : 4); ++i) {
      if constexpr (kStore) {
        store_four(memory + i * kThreads * kPer, *arrays[i]);
      } else {
        load_four(*arrays[i], memory + i * kThreads * kPer);
      }
    }
  }

  // The gradient of the state after a part.
  __device__ __forceinline__ void load_carry(int64_t slot, int64_t first, bool last) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t n = first + lane_.lane * kPer + i;
      A x = A(0);
      if (there(n)) {
        if (call_.split.part != 0) {
          x = static_cast<const A*>(call_.split.begin_states)[(slot * p_.state + n) * p_.dim + dim()];
        } else if (last && p_.dlast_state != nullptr) {
          x = static_cast<const A*>(p_.dlast_state)[(number_ * p_.dim + dim()) * p_.state + n];
        }
      }
      lane_.carry[i] = x;
    }
  }
  __device__ __forceinline__ void store_carry(int64_t first) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t n = first + lane_.lane * kPer + i;
      if (there(n)) static_cast<A*>(p_.dinitial_state)[(number_ * p_.dim + dim()) * p_.state + n] = lane_.carry[i];
    }
  }

  // The state before position t0, the first of a chunk.
  __device__ __forceinline__ void load_start(int64_t t0, int64_t first, A (&h)[kPer]) const {
    const int64_t k = (t0 - sequence_.begin) / kChunk;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t n = first + lane_.lane * kPer + i;
      h[i] = A(0);
      if (!there(n)) continue;
      h[i] = k > 0 ? static_cast<const A*>(p_.chunk_states)[((sequence_.chunk_begin + k - 1) * p_.state + n) * p_.dim + dim()]
                   : fastlm::cuda::load_param<A>(
                         p_.initial_state, p_.initial_dtype,
                         number_ * p_.initial_batch_stride + dim() * p_.initial_dim_stride + n * p_.initial_state_stride);
    }
  }

  __device__ __forceinline__ void store_parameters(int64_t first) const {
    const ParameterRows& rows = call_.parameters;
    A* to = static_cast<A*>(call_.parameter_sums) + slice_ * rows.count * p_.dim + dim();
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t n = first + lane_.lane * kPer + i;
      if (!there(n)) continue;
      to[n * p_.dim] = lane_.dA[i];
      if constexpr (!Shape::kPlain) {
        if (p_.B.constant) to[(rows.b + n) * p_.dim] = lane_.dB[i];
        if (p_.C.constant) to[(rows.c + n) * p_.dim] = lane_.dC[i];
      }
    }
  }

  // dD and the bias, from the threads that saw a channel's positions.
  __device__ __forceinline__ void store_channel_sums() const {
    constexpr int kShares = kThreads / kChannels;
    A* shares = at(Shape::kWork);
    team_.sync();
    shares[team_.thread] = dskip_;
    shares[kThreads + team_.thread] = dbias_;
    team_.sync();
    const int channel = team_.thread % kChannels, which = team_.thread / kChannels;
    if (which > 1 || channel >= block_.channels) return;
    A sum = A(0);
#pragma unroll
    for (int i = 0; i < kShares; ++i) sum += shares[which * kThreads + i * kChannels + channel];
    const ParameterRows& rows = call_.parameters;
    const int64_t row = slice_ * rows.count + (which == 0 ? rows.skip : rows.bias);
    static_cast<A*>(call_.parameter_sums)[row * p_.dim + block_.channel + channel] = sum;
  }

  // Sums over the warps of a sub-chunk's dB and dC, to this block's row.
  __device__ __forceinline__ void keep_terms(const A (&dB)[4], const A (&dC)[4]) const {
    const int j = lane_.channel % 8;
    store_four(lane_.terms + j * kStates + lane_.lane * kPer, dB);
    store_four(lane_.terms + (kSub + j) * kStates + lane_.lane * kPer, dC);
  }
  static constexpr int kTerms = 2 * kSub * kStates, kEachTerms = kTerms / (2 * kThreads);
  // This thread's first place in the row of a sub-chunk.
  __device__ __forceinline__ A* terms_place(const Positions& s, int sub, int64_t first) const {
    if (call_.position_sums == nullptr) return nullptr;
    const int i = team_.thread * 2, which = i / (kSub * kStates), j = i / kStates % kSub;
    const int64_t position = s.batch * p_.seqlen + s.t0 + sub * kSub + j;
    return static_cast<A*>(call_.position_sums) +
           ((block_.index * p_.batch * p_.seqlen + position) * 2 + which) * call_.padded_state + first + i % kStates;
  }
  __device__ __forceinline__ void store_terms(int steps, A* to) const {
    constexpr int kWarp = Shape::kWarpTerms / Shape::kSize;
    const A* from = at(Shape::kWork + Shape::kLaneSums) + team_.thread * 2;
    // The second half of the terms, where a thread has some of both, is dC.
    static_assert(kEachTerms == 1 || kEachTerms == 2);
    if (to == nullptr || team_.thread * 2 / kStates % kSub >= steps) return;
#pragma unroll
    for (int half = 0; half < kEachTerms; ++half, from += 2 * kThreads, to += call_.padded_state) {
      A x = from[0], y = from[1];
#pragma unroll
      for (int w = 1; w < Shape::kWarps; ++w) x += from[w * kWarp], y += from[w * kWarp + 1];
      if constexpr (sizeof(A) == 4) {
        *reinterpret_cast<float2*>(to) = make_float2(x, y);
      } else {
        *reinterpret_cast<double2*>(to) = make_double2(x, y);
      }
    }
  }

  // Turns sums over states into du, ddelta and dz of this thread's positions.
  template <class Sum>
  __device__ __forceinline__ void finish(const Positions& s, int sub, const Inputs<Shape>& in, const Sum& sum) {
    const int channel = team_.thread % kChannels;
#pragma unroll
    for (int i = 0; i < Shape::kEach; ++i) {
      const int j = Inputs<Shape>::step(team_.thread, i), t = sub * kSub + j;
      if (t >= s.steps || !own_.there) continue;
      const A dt = at(Shape::kPairs)[(t * kChannels + channel) * 2];
      const A sum_b = sum(1, j);
      // decay is A log2(e): ln 2 turns the sum back into one over A.
      A ddelta = fastlm::cuda::multiply_add(in.u[i], sum_b, A(0.6931471805599453) * sum(2, j));
      if (p_.delta_softplus && in.x[i] <= A(20)) ddelta *= fast_sigmoid(in.x[i]);
      dskip_ = fastlm::cuda::multiply_add(in.dy[i], in.u[i], dskip_);
      dbias_ += ddelta;
      constexpr int kStep = kThreads / kChannels;
      results_.du[i * kStep * p_.du.seq_stride] =
          fastlm::cuda::from_acc<T>(fastlm::cuda::multiply_add(own_.skip, in.dy[i], dt * sum_b));
      results_.ddelta[i * kStep * p_.ddelta.seq_stride] = fastlm::cuda::from_acc<T>(ddelta);
      if (p_.dz.data != nullptr) {
        results_.dz[i * kStep * p_.dz.seq_stride] =
            fastlm::cuda::from_acc<T>(in.gate[i] * fastlm::cuda::multiply_add(own_.skip, in.u[i], sum(0, j)));
      }
    }
    results_.du -= kSub * p_.du.seq_stride;
    results_.ddelta -= kSub * p_.ddelta.seq_stride;
    if (p_.dz.data != nullptr) results_.dz -= kSub * p_.dz.seq_stride;
  }
  __device__ __forceinline__ A lane_sum(int which, int j) const {
    A x[4];
    load_four(x, at(Shape::kWork) + (which * kSub + j) * kThreads + team_.thread % kChannels * 4);
    return (x[0] + x[1]) + (x[2] + x[3]);
  }

  // The sub-chunks of a chunk for one group of states, last first. The ring holds the inputs of the last one.
  __device__ __forceinline__ void sweeps(const Positions& s, int64_t first) {
    const int subs = (s.steps + kSub - 1) / kSub;
    char* const ring = shared_ + Shape::kRing;
    A h[kPer];
    A* const kept = at(0) + team_.thread * kPer;
    in_.read(team_.thread, call_, own_.bias, at(Shape::kDy));
    load_start(s.t0, first, h);
    team_.sync();
    if (subs > 1) mover_.copy(team_, call_, block_, s, subs - 2, ring);
    lane_.keep_states(call_, subs, h, kept);
    A* terms = terms_place(s, subs - 1, first);
    if constexpr (!Shape::kMany) results_.start(team_.thread, call_, block_, s, subs - 1);
#pragma unroll 1
    for (int sub = subs - 1; sub >= 0; --sub) {
      A dB[4], dC[4];
      load_four(h, kept + sub * kThreads * kPer);
      lane_.sweep(call_, sub * kSub, h, dB, dC);
      keep_terms(dB, dC);
      fastlm::cuda::wait_copies<0>();
      team_.sync();
      store_terms(s.steps - sub * kSub, terms);
      if (terms != nullptr) terms -= 2 * kSub * call_.padded_state;
      if constexpr (Shape::kMany) {
        const int channel = team_.thread % kChannels;
#pragma unroll
        for (int i = 0; i < Shape::kEach; ++i) {
          const int j = Inputs<Shape>::step(team_.thread, i);
#pragma unroll
          for (int which = 0; which < 3; ++which) {
            A* total = at(Shape::kTotals) + (which * kSteps + sub * kSub + j) * kChannels + channel;
            *total = lane_sum(which, j) + (first == 0 ? A(0) : *total);
          }
        }
      } else {
        finish(s, sub, in_, [&](int which, int j) { return lane_sum(which, j); });
      }
      if (sub > 0) in_.read(team_.thread, call_, own_.bias, at(Shape::kDy));
      team_.sync();
      if (sub > 1) mover_.copy(team_, call_, block_, s, sub - 2, ring);
    }
  }

  __device__ __forceinline__ void chunk(const Positions& s) {
    const int last = (s.steps + kSub - 1) / kSub - 1;
    char* const raw = shared_ + Shape::kWork;
    char* const ring = shared_ + Shape::kRing;
    const auto tile = [&](int which, const Activation& x, Order order) {
      stage<kSteps, kChannels>(team_, raw + which * Shape::Channels::kBytes, tile_of<T>(x, order, s.batch, block_.channel, s.t0),
                               s.steps, block_.channels);
    };
    tile(0, p_.u, call_.order.u);
    tile(1, p_.delta, call_.order.delta);
    stage_states<Shape>(team_, call_, block_, s, 0, raw + 2 * Shape::Channels::kBytes);
    mover_.start(team_.thread, call_, block_, s, last);
    mover_.copy(team_, call_, block_, s, last, ring);
    fastlm::cuda::wait_copies<0>();
    team_.sync();
    form_pairs<Shape>(team_, call_, s.steps, raw, own_.bias, at(Shape::kPairs));
    form_states<Shape>(team_, call_, raw + 2 * Shape::Channels::kBytes, at(Shape::kB), at(Shape::kC));
    if constexpr (!Shape::kMany) {
      sweeps(s, 0);
    } else {
      many_sweeps(s, last);
    }
  }

  __device__ __forceinline__ void many_sweeps(const Positions& s, int last) {
    char* const raw = shared_ + Shape::kWork;
    char* const ring = shared_ + Shape::kRing;
#pragma unroll 1
    for (int64_t first = 0; first < p_.state; first += kStates) {
      if (first > 0) {
        stage_states<Shape>(team_, call_, block_, s, first, raw);
        mover_.start(team_.thread, call_, block_, s, last);
        mover_.copy(team_, call_, block_, s, last, ring);
        fastlm::cuda::wait_copies<0>();
        team_.sync();
        form_states<Shape>(team_, call_, raw, at(Shape::kB), at(Shape::kC));
      }
      load_parameters(first);
      exchange<false>(first);
      sweeps(s, first);
      exchange<true>(first);
    }
    mover_.start(team_.thread, call_, block_, s, last);
    results_.start(team_.thread, call_, block_, s, last);
#pragma unroll 1
    for (int sub = last; sub >= 0; --sub) {
      mover_.copy(team_, call_, block_, s, sub, ring);
      fastlm::cuda::wait_copies<0>();
      team_.sync();
      in_.read(team_.thread, call_, own_.bias, at(Shape::kDy));
      finish(s, sub, in_, [&](int which, int j) {
        return at(Shape::kTotals)[(which * kSteps + sub * kSub + j) * kChannels + team_.thread % kChannels];
      });
      team_.sync();
    }
  }

  // Where this thread's results of a sub-chunk go; `finish` moves them to the one before.
  struct Results {
    T *du, *ddelta, *dz;
    __device__ __forceinline__ void start(int thread, const BackwardCall& call, const BackwardBlock& block, const Positions& s,
                                          int sub) {
      const auto place = [&](const Activation& x) {
        return static_cast<T*>(x.data) + s.batch * x.batch_stride + (block.channel + thread % kChannels) * x.dim_stride +
               (s.t0 + sub * kSub + thread / kChannels) * x.seq_stride;
      };
      du = place(call.p.du);
      ddelta = place(call.p.ddelta);
      dz = call.p.dz.data == nullptr ? nullptr : place(call.p.dz);
    }
  };

  const Team<kThreads>& team_;
  const BackwardCall& call_;
  const BackwardParams& p_;
  const int64_t slice_;
  const BackwardBlock block_;
  char* const shared_;
  const ChannelParameters<A> own_;
  A dskip_, dbias_;
  int64_t number_;
  Sequence sequence_;
  Lane<Shape> lane_;
  SubMover<Shape> mover_;
  Results results_;
  Inputs<Shape> in_;
};

// Teams that share a multiprocessor: as many as its shared memory holds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class Shape>
constexpr int kTeams = 2;
#else
template <class Shape>
constexpr int kTeams = Shape::kMany || sizeof(typename Shape::T) > 2 ? 2 : 3;
#endif

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kTeams<Shape>) backward_kernel(const __grid_constant__ BackwardCall call) {
  const Team<Shape::kThreads> team{static_cast<int>(threadIdx.x), 1};
  const int64_t blocks = Shape::blocks(call.p);
  BackwardTile<Shape>(team, call, blockIdx.x / blocks, blockIdx.x % blocks, fastlm::cuda::shared_memory()).run();
}

}  // namespace fastlm::selective_scan::cuda
