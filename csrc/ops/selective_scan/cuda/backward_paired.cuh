// Mamba-1 selective scan on CUDA, backward, with two channels a lane: 16 bits, N up to 16, B and C given per position, where two
// teams of 112 KiB fit a multiprocessor. What backward.cuh says of chunks, kept states and the tape holds here too.
//
// A team of 128 threads holds 64 channels, each warp 16 of them: a lane has four states of two neighbours. B and C are read once
// for both, terms of dB and dC of both are added before they go to shared memory, and a position has one row of sums for 64
// channels. Inputs, sums over states and results stay within the warp; only the sums of dB and dC over warps need a barrier of
// the team, one for each sub-chunk. They take the place of that sub-chunk's kept states: none is overwritten before it was read.
//
// The tape takes 128 registers of 255. Bound by instruction issue, with two warps on a scheduler; docs/cuda.md counts.
#pragma once

#include "ops/selective_scan/cuda/backward_paired_sweep.cuh"

namespace fastlm::selective_scan::cuda {

template <class Shape>
class PairedTile {
  using T = typename Shape::T;
  using Pair = typename PairedLane<Shape>::Pair;
  static constexpr int kThreads = Shape::kThreads, kStates = Shape::kStates, kPer = Shape::kPer, kSub = Shape::kSub;

 public:
  __device__ __forceinline__ PairedTile(const Team<kThreads>& team, const BackwardCall& call, int64_t slice, int64_t block,
                                        char* shared)
      : team_(team),
        call_(call),
        p_(call.p),
        slice_(slice),
        block_(backward_block<Shape>(call.p, block)),
        shared_(shared),
        own_(shared + Shape::kWarpAt + team.thread / 32 * Shape::kWarpBytes),
        thread_lane_(team.thread & 31),
        first_(team.thread / 32 * Shape::kWarpChannels),
        lane_(team.thread & 31, team.thread / 32 * Shape::kPairs, shared, own_) {
    const auto vectors = [&](const Activation& x) {
      return x.data == nullptr ||
             (x.dim_stride == 1 &&
              (reinterpret_cast<uintptr_t>(x.data) | x.batch_stride * sizeof(T) | x.seq_stride * sizeof(T)) % 4 == 0);
    };
    const auto by_rows = [](Order order) { return order != Order::kColumns; };
    fast_ = block_.channels == Shape::kChannels && block_.channel % 2 == 0 && vectors(p_.du) && vectors(p_.ddelta) &&
            vectors(p_.dz) && by_rows(call.order.u) && by_rows(call.order.delta) && by_rows(call.order.z) &&
            by_rows(call.order.dout);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t d = block_.channel + item_channel() + c;
      const bool there = item_there(c);
      bias_[c] =
          there ? fastlm::cuda::load_param<float>(p_.delta_bias.data, p_.delta_bias.dtype, d * p_.delta_bias.dim_stride) : 0.0f;
      skip_[c] = there ? fastlm::cuda::load_param<float>(p_.D.data, p_.D.dtype, d * p_.D.dim_stride) : 0.0f;
      dskip_[c] = dbias_[c] = 0.0f;
    }
    each_state([&](int c, int i, int64_t n, int64_t d, bool there) {
      // Rounded once: the error is that of every exponent of the channel.
      lane_.decay[c][i] =
          there ? static_cast<float>(kLog2e * fastlm::cuda::load_param<double>(p_.A.data, p_.A.dtype,
                                                                               d * p_.A.dim_stride + n * p_.A.state_stride))
                : 0.0f;
      lane_.carry[c][i] = lane_.dA[c][i] = 0.0f;
    });
  }

  __device__ __forceinline__ void run() {
    const int64_t begin = call_.split.slots * slice_ / call_.slices, end = call_.split.slots * (slice_ + 1) / call_.slices;
#pragma unroll 1
    for (int64_t slot = begin; slot < end; ++slot) {
      const Part part = part_of(p_, call_.split, slot);
      if (part.number < 0) continue;
      load_carry(slot, part);
      const int64_t chunks = ceil_div(part.end - part.begin, kChunk);
#pragma unroll 1
      for (int64_t k = chunks - 1; k >= 0; --k) {
        const int64_t t0 = part.begin + k * kChunk;
        chunk(part, {part.sequence.batch, t0, static_cast<int>(min_of(kChunk, part.end - t0))});
      }
      if (p_.dinitial_state == nullptr || part.begin != part.sequence.begin) continue;
      each_state([&](int c, int i, int64_t n, int64_t d, bool there) {
        if (there) static_cast<float*>(p_.dinitial_state)[(part.number * p_.dim + d) * p_.state + n] = lane_.carry[c][i];
      });
    }
    const ParameterRows& rows = call_.parameters;
    float* const to = static_cast<float*>(call_.parameter_sums) + slice_ * rows.count * p_.dim;
    each_state([&](int c, int i, int64_t n, int64_t d, bool there) {
      if (there) to[n * p_.dim + d] = lane_.dA[c][i];
    });
    // dD and the bias, from the four lanes that saw a channel's positions.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int distance = 8; distance < 32; distance *= 2) {
        dskip_[c] += __shfl_xor_sync(kFullWarp, dskip_[c], distance);
        dbias_[c] += __shfl_xor_sync(kFullWarp, dbias_[c], distance);
      }
      if (thread_lane_ >= 8 || !item_there(c)) continue;
      const int64_t d = block_.channel + item_channel() + c;
      to[rows.skip * p_.dim + d] = dskip_[c];
      to[rows.bias * p_.dim + d] = dbias_[c];
    }
  }

 private:
  __device__ __forceinline__ float* at(int bytes) const { return reinterpret_cast<float*>(shared_ + bytes); }
  __device__ __forceinline__ float* own(int bytes) const { return reinterpret_cast<float*>(own_ + bytes); }
  // The first channel of this lane's items, in the block.
  __device__ __forceinline__ int item_channel() const { return first_ + 2 * Item::pair(thread_lane_); }
  __device__ __forceinline__ bool item_there(int c) const { return item_channel() + c < block_.channels; }

  // f(of the pair, of the lane's states, state, channel, whether both exist)
  template <class F>
  __device__ __forceinline__ void each_state(const F& f) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = first_ + thread_lane_ / 4 * 2 + c;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int n = thread_lane_ % 4 * kPer + i;
        f(c, i, n, block_.channel + channel, channel < block_.channels && n < p_.state);
      }
    }
  }

  // The gradient of the state after a part.
  __device__ __forceinline__ void load_carry(int64_t slot, const Part& part) {
    const bool last = part.end == part.sequence.end;
    each_state([&](int c, int i, int64_t n, int64_t d, bool there) {
      float x = 0.0f;
      if (there) {
        if (call_.split.part != 0) {
          x = static_cast<const float*>(call_.split.begin_states)[(slot * p_.state + n) * p_.dim + d];
        } else if (last && p_.dlast_state != nullptr) {
          x = static_cast<const float*>(p_.dlast_state)[(part.number * p_.dim + d) * p_.state + n];
        }
      }
      lane_.carry[c][i] = x;
    });
  }

  // The state before position t0, the first of a chunk.
  __device__ __forceinline__ void load_start(const Part& part, int64_t t0, Pair& h) const {
    const int64_t k = (t0 - part.sequence.begin) / kChunk;
    if (k > 0) {
      const float* from = static_cast<const float*>(p_.chunk_states) + (part.sequence.chunk_begin + k - 1) * p_.state * p_.dim;
      each_state([&](int c, int i, int64_t n, int64_t d, bool there) { h[c][i] = there ? from[n * p_.dim + d] : 0.0f; });
    } else {
      each_state([&](int c, int i, int64_t n, int64_t d, bool there) {
        h[c][i] = there ? fastlm::cuda::load_param<float>(
                              p_.initial_state, p_.initial_dtype,
                              part.number * p_.initial_batch_stride + d * p_.initial_dim_stride + n * p_.initial_state_stride)
                        : 0.0f;
      });
    }
  }

  // dy and dz / y of this lane's items of a sub-chunk.
  template <bool kFast>
  __device__ __forceinline__ void open() const {
    const bool gated = p_.z.data != nullptr;
#pragma unroll
    for (int i = 0; i < Item::kEach; ++i) {
      const int j = Item::step(thread_lane_, i), pair = Item::pair(thread_lane_);
      float dy[2], z[2], gate[2];
      read_pair<Shape, kFast>(own_ + Shape::kRing, 3, call_.order.dout, j, pair, dy);
      if (gated) {
        read_pair<Shape, kFast>(own_ + Shape::kRing, 2, call_.order.z, j, pair, z);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float sigma = fast_sigmoid(z[c]);
          gate[c] = dy[c] * (sigma * (1.0f + z[c] * (1.0f - sigma)));
          dy[c] *= z[c] * sigma;
        }
        *reinterpret_cast<float2*>(item(Shape::kGate, i)) = make_float2(gate[0], gate[1]);
      }
      *reinterpret_cast<float2*>(item(Shape::kDy, i)) = make_float2(dy[0], dy[1]);
    }
  }
  __device__ __forceinline__ float* item(int bytes, int i) const {
    return own(bytes) + Item::step(thread_lane_, i) * Shape::kWarpChannels + 2 * Item::pair(thread_lane_);
  }
  __device__ __forceinline__ void read_item(int bytes, int i, float (&x)[2]) const {
    const float2 pair = *reinterpret_cast<const float2*>(item(bytes, i));
    x[0] = pair.x, x[1] = pair.y;
  }
  // Over the four lanes of an item's pair. Halves are read in turns: so the pairs meet different banks.
  __device__ __forceinline__ void lane_sums(int which, int i, float (&sum)[2]) const {
    const int pair = Item::pair(thread_lane_), half = pair / 4 * 4;
    const float* from = own(0) + which * Shape::kLaneSums + Item::step(thread_lane_, i) * 64 + pair * 8;
    float x[4], y[4];
    load_four(x, from + half);
    load_four(y, from + (half ^ 4));
    sum[0] = (x[0] + x[2]) + (y[0] + y[2]);
    sum[1] = (x[1] + x[3]) + (y[1] + y[3]);
  }

  // Where this lane's results of a sub-chunk go.
  __device__ __forceinline__ T* result_place(const Activation& x, const Positions& s, int sub) const {
    return static_cast<T*>(x.data) + s.batch * x.batch_stride + (block_.channel + item_channel()) * x.dim_stride +
           (s.t0 + sub * kSub + Item::step(thread_lane_, 0)) * x.seq_stride;
  }
  template <bool kFast>
  __device__ __forceinline__ void store_result(const Activation& x, T* first, int i, const float (&value)[2]) const {
    T* const to = first + i * 4 * x.seq_stride;
    if constexpr (kFast) {
      *reinterpret_cast<uint32_t*>(to) = fastlm::cuda::pack_pair<T>(value[0], value[1]);
    } else {
      if (item_there(0)) to[0] = fastlm::cuda::from_acc<T>(value[0]);
      if (item_there(1)) to[x.dim_stride] = fastlm::cuda::from_acc<T>(value[1]);
    }
  }

  // dz of this lane's items. kFast: every position exists, too.
  template <bool kFast>
  __device__ __forceinline__ void finish_gate(int steps, T* to) const {
#pragma unroll
    for (int i = 0; i < Item::kEach; ++i) {
      const int j = Item::step(thread_lane_, i);
      if (!kFast && j >= steps) continue;
      float y[2], u[2], gate[2];
      lane_sums(0, i, y);
      read_pair<Shape, kFast>(own_ + Shape::kRing, 0, call_.order.u, j, Item::pair(thread_lane_), u);
      read_item(Shape::kGate, i, gate);
#pragma unroll
      for (int c = 0; c < 2; ++c) y[c] = gate[c] * fmaf(skip_[c], u[c], y[c]);
      store_result<kFast>(p_.dz, to, i, y);
    }
  }
  // du and ddelta.
  template <bool kFast>
  __device__ __forceinline__ void finish(const float* dt_row, int steps, T* du, T* ddelta) {
#pragma unroll
    for (int i = 0; i < Item::kEach; ++i) {
      const int j = Item::step(thread_lane_, i), pair = Item::pair(thread_lane_);
      if (!kFast && j >= steps) continue;
      float sum_b[2], slope[2], u[2], x[2], dy[2], dt[4];
      lane_sums(0, i, sum_b);
      lane_sums(1, i, slope);
      read_pair<Shape, kFast>(own_ + Shape::kRing, 0, call_.order.u, j, pair, u);
      read_pair<Shape, kFast>(own_ + Shape::kRing, 1, call_.order.delta, j, pair, x);
      read_item(Shape::kDy, i, dy);
      load_four(dt, dt_row + i * 4 * Shape::kChannels * 2);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // decay is A log2(e): ln 2 turns the sum back into one over A.
        slope[c] = fmaf(u[c], sum_b[c], 0.6931471805599453f * slope[c]);
        x[c] += bias_[c];
        if (p_.delta_softplus && x[c] <= 20.0f) slope[c] *= fast_sigmoid(x[c]);
        dskip_[c] = fmaf(dy[c], u[c], dskip_[c]);
        dbias_[c] += slope[c];
        sum_b[c] = fmaf(skip_[c], dy[c], dt[2 * c] * sum_b[c]);
      }
      store_result<kFast>(p_.du, du, i, sum_b);
      store_result<kFast>(p_.ddelta, ddelta, i, slope);
    }
  }

  // This thread's first place in the row of a sub-chunk's sums of dB and dC.
  __device__ __forceinline__ float* sums_place(const Positions& s, int sub) const {
    const unsigned int i = team_.thread * 2, which = i / (kSub * kStates), j = i / kStates % kSub;
    const int64_t position = s.batch * p_.seqlen + s.t0 + sub * kSub + j;
    return static_cast<float*>(call_.position_sums) +
           ((block_.index * p_.batch * p_.seqlen + position) * 2 + which) * call_.padded_state + i % kStates;
  }
  // Over the warps, to this block's row.
  __device__ __forceinline__ void store_sums(const float* kept, int steps, float* to) const {
    static_assert(Shape::kWarpKept == 2 * kThreads);
    if (static_cast<int>(team_.thread * 2u / kStates % kSub) >= steps) return;
    const float* from = kept + team_.thread * 2;
    float2 sum = *reinterpret_cast<const float2*>(from);
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) {
      const float2 x = *reinterpret_cast<const float2*>(from + w * Shape::kWarpKept);
      sum.x += x.x, sum.y += x.y;
    }
    *reinterpret_cast<float2*>(to) = sum;
  }

  __device__ __forceinline__ void chunk(const Part& part, const Positions& s) {
    const int last = (s.steps + kSub - 1) / kSub - 1;
    char* const raw = shared_ + Shape::kRaw;
    char* const ring = own_ + Shape::kRing;
    const auto tile = [&](int which, const Activation& x, Order order) {
      using Whole = Mover<T, Shape::kSteps, Shape::kChannels, kThreads>;
      const Source<T> source = tile_of<T>(x, order, s.batch, block_.channel, s.t0);
      char* const to = raw + which * Shape::Channels::kBytes;
      if (s.steps == Shape::kSteps && Whole::applies(source, block_.channels)) {
        Whole(source, team_.thread).copy(to, source, team_.thread);
      } else {
        stage<Shape::kSteps, Shape::kChannels>(team_, to, source, s.steps, block_.channels);
      }
    };
    team_.sync();
    tile(0, p_.u, call_.order.u);
    tile(1, p_.delta, call_.order.delta);
    stage_states<Shape>(team_, call_, block_, s, 0, raw + 2 * Shape::Channels::kBytes);
    mover_.start(thread_lane_, call_, block_, first_, s, last, ring);
    fastlm::cuda::commit_copies();
    Pair h;
    load_start(part, s.t0, h);
    fastlm::cuda::wait_copies<0>();
    team_.sync();
    if (fast_) {
      form_steps<Shape, true>(thread_lane_, first_, call_, s.steps, raw, bias_, at(Shape::kStepsAt));
    } else {
      form_steps<Shape, false>(thread_lane_, first_, call_, s.steps, raw, bias_, at(Shape::kStepsAt));
    }
    const char* const states = raw + 2 * Shape::Channels::kBytes;
    widen_states<Shape>(team_.thread, states, call_.order.B, at(Shape::kB));
    widen_states<Shape>(team_.thread, states + Shape::States::kBytes, call_.order.C, at(Shape::kC));
    if (fast_) {
      open<true>();
    } else {
      open<false>();
    }
    team_.sync();
    if (last > 0) mover_.template copy<1>(thread_lane_, call_, block_, first_, s, last - 1, ring);
    fastlm::cuda::commit_copies();

    // This lane's share of the kept states, and its warp's.
    float* const kept = at(0) + team_.thread / 32 * Shape::kWarpKept + thread_lane_ * kPer;
    lane_.keep_states(last + 1, h, kept);
    float* sums = sums_place(s, last);
    int steps = s.steps - last * kSub;  // from the sub-chunk at hand on
    T *du = result_place(p_.du, s, last), *ddelta = result_place(p_.ddelta, s, last), *dz = result_place(p_.dz, s, last);
#pragma unroll 1
    for (int sub = last; sub >= 0; --sub) {
      const bool whole = fast_ && steps >= kSub;
      float* const slot = kept + sub * Shape::kKept;
      typename PairedLane<Shape>::Tape tape;
      float sum[4];
      PairedLane<Shape>::load(h, slot);
      lane_.forward(sub * kSub, h, tape);
      fastlm::cuda::wait_copies<0>();
      __syncwarp();
      lane_.sum_terms(sum);
      store_four(slot + kSub * kStates, sum);
      if (p_.z.data != nullptr) {
        if (whole) {
          finish_gate<true>(steps, dz);
        } else {
          finish_gate<false>(steps, dz);
        }
      }
      __syncwarp();
      lane_.back(sub * kSub, tape);
      __syncwarp();
      lane_.sum_terms(sum);
      store_four(slot, sum);
      const float* const dt_row =
          at(Shape::kStepsAt) + ((sub * kSub + Item::step(thread_lane_, 0)) * Shape::kChannels + item_channel()) * 2;
      if (whole) {
        finish<true>(dt_row, steps, du, ddelta);
        if (sub > 0) open<true>();
      } else {
        finish<false>(dt_row, steps, du, ddelta);
        if (sub > 0) open<false>();
      }
      __syncwarp();
      if (sub > 0) mover_.template copy<0>(thread_lane_, call_, block_, first_, s, sub - 1, ring);
      if (sub > 1) mover_.template copy<1>(thread_lane_, call_, block_, first_, s, sub - 2, ring);
      fastlm::cuda::commit_copies();
      team_.sync();
      store_sums(at(0) + sub * Shape::kKept, steps, sums);
      sums -= 2 * kSub * call_.padded_state;
      steps += kSub;
      du -= kSub * p_.du.seq_stride, ddelta -= kSub * p_.ddelta.seq_stride, dz -= kSub * p_.dz.seq_stride;
    }
  }

  const Team<kThreads>& team_;
  const BackwardCall& call_;
  const BackwardParams& p_;
  const int64_t slice_;
  const BackwardBlock block_;
  char *const shared_, *const own_;
  const int thread_lane_, first_;                  // in the warp; the warp's first channel in the block
  bool fast_;                                      // no input lies in columns, two channels of a result are one aligned word
  float bias_[2], skip_[2], dskip_[2], dbias_[2];  // of this lane's items
  PairedLane<Shape> lane_;
  WarpMover<Shape> mover_;
};

template <class T>
__global__ void __launch_bounds__(PairedShape<T>::kThreads, 2) backward_paired_kernel(const __grid_constant__ BackwardCall call) {
  using Shape = PairedShape<T>;
  const Team<Shape::kThreads> team{static_cast<int>(threadIdx.x), 1};
  const int64_t blocks = Shape::blocks(call.p);
  PairedTile<Shape>(team, call, blockIdx.x / blocks, blockIdx.x % blocks, fastlm::cuda::shared_memory()).run();
}

}  // namespace fastlm::selective_scan::cuda
