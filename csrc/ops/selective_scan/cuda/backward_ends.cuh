// Where time is split: the gradient of the state before each part, if that after it were 0, and the product of the part's decays.
// Then backward_sums.cuh carries gradients over the parts, and backward.cuh visits every part from its own. One exponential and
// four other operations a state and position: a fifth of what the backward pass itself takes.
#pragma once

#include "ops/selective_scan/cuda/backward_sweep.cuh"

namespace fastlm::selective_scan::cuda {

// The same blocks of channels as those of the backward pass; up to kBackwardStates states.
template <class T>
struct EndsShape : BackwardShape<T, false, false> {
  using Base = BackwardShape<T, false, false>;
  static constexpr int kC = Base::kSteps * Base::kChannels * 2 * Base::kSize;  // after the pairs (dt, dy)
  static constexpr int kRaw = kC + Base::kSteps * Base::kStates * Base::kSize;
  static constexpr int kSharedBytes = kRaw + 3 * Base::Channels::kBytes + 2 * Base::States::kBytes;
};

template <class T>
__device__ __forceinline__ void ends_tile(const Team<EndsShape<T>::kThreads>& team, const BackwardCall& call, int64_t slot,
                                          int64_t block_index, char* shared) {
  using Shape = EndsShape<T>;
  using A = typename Shape::A;
  constexpr int kSteps = Shape::kSteps, kChannels = Shape::kChannels, kStates = Shape::kStates, kPer = Shape::kPer;
  const BackwardParams& p = call.p;
  const Part part = part_of(p, call.split, slot);
  if (part.number < 0) return;
  const BackwardBlock block = backward_block<Shape>(p, block_index);
  const int thread = team.thread, channel = thread / Shape::kLanes, lane = thread % Shape::kLanes;
  const ChannelParameters<A> own(p, block, thread % kChannels);
  A* const pairs = reinterpret_cast<A*>(shared);
  A* const C = reinterpret_cast<A*>(shared + Shape::kC);
  char* const raw = shared + Shape::kRaw;
  const auto tile_bytes = [](int i) { return i * Shape::Channels::kBytes; };

  A decay[kPer], carry[kPer], c_constant[kPer], total = A(0);
  const int64_t d = block.channel + channel;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = lane * kPer + i;
    const bool there = channel < block.channels && n < p.state;
    decay[i] = there ? static_cast<A>(kLog2e * fastlm::cuda::load_param<double>(p.A.data, p.A.dtype,
                                                                                d * p.A.dim_stride + n * p.A.state_stride))
                     : A(0);
    c_constant[i] = there && p.C.constant
                        ? fastlm::cuda::load_param<A>(p.C.data, p.C.dtype, d * p.C.dim_stride + n * p.C.state_stride)
                        : A(0);
    carry[i] = A(0);
  }
#pragma unroll 1
  for (int64_t k = ceil_div(part.end - part.begin, kChunk) - 1; k >= 0; --k) {
    const int64_t t0 = part.begin + k * kChunk, batch = part.sequence.batch;
    const int steps = static_cast<int>(min_of(kChunk, part.end - t0));
    const auto tile = [&](int which, const Activation& x, Order order) {
      stage<kSteps, kChannels>(team, raw + tile_bytes(which), tile_of<T>(x, order, batch, block.channel, t0), steps,
                               block.channels);
    };
    tile(0, p.delta, call.order.delta);
    if (p.z.data != nullptr) tile(1, p.z, call.order.z);
    tile(2, p.dout, call.order.dout);
    if (!p.C.constant) {
      stage<kSteps, kStates>(team, raw + tile_bytes(3), tile_of<T>(p, p.C, call.order.C, batch, block.group, t0, 0), steps,
                             static_cast<int>(p.state));
    }
    fastlm::cuda::commit_copies();
    fastlm::cuda::wait_copies<0>();
    team.sync();
    const Staged<T, kSteps, kChannels> delta(raw, call.order.delta), z(raw + tile_bytes(1), call.order.z),
        dout(raw + tile_bytes(2), call.order.dout);
#pragma unroll 2
    for (int t = thread / kChannels; t < kSteps; t += Shape::kThreads / kChannels) {
      A dt = delta.at(t, thread % kChannels) + own.bias, dy = dout.at(t, thread % kChannels);
      if (p.delta_softplus) dt = softplus<sizeof(T) != 2>(dt);
      if (p.z.data != nullptr) {
        const A gate = z.at(t, thread % kChannels);
        dy *= gate * fast_sigmoid(gate);
      }
      A* pair = pairs + (t * kChannels + thread % kChannels) * 2;
      pair[0] = t < steps ? dt : A(0);
      pair[1] = dy;
    }
    const Staged<T, kSteps, kStates> c(raw + tile_bytes(3), call.order.C);
    if (!p.C.constant) {
#pragma unroll 2
      for (int i = thread; i < kSteps * kStates; i += Shape::kThreads) C[i] = c.at(i / kStates, i % kStates);
    }
    team.sync();
    const A* pair = pairs + channel * 2;
#pragma unroll 1
    for (int t = (steps + 7) / 8 * 8 - 8; t >= 0; t -= 8) {
#pragma unroll
      for (int j = 7; j >= 0; --j) {
        const A dt = pair[(t + j) * kChannels * 2], dy = pair[(t + j) * kChannels * 2 + 1];
        A row[kPer];
        load_four(row, C + (t + j) * kStates + lane * kPer);
        total += dt;
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const A weight = p.C.constant ? c_constant[i] : row[i];
          carry[i] = power_of_two(dt * decay[i]) * fastlm::cuda::multiply_add(weight, dy, carry[i]);
        }
      }
    }
    team.sync();
  }
  if (channel >= block.channels) return;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t n = lane * kPer + i, at = (slot * p.state + n) * p.dim + d;
    if (n >= p.state) continue;
    static_cast<A*>(call.split.end_states)[at] = carry[i];
    static_cast<A*>(call.split.decays)[at] = power_of_two(decay[i] * total);
  }
}

template <class T>
__global__ void __launch_bounds__(EndsShape<T>::kThreads) backward_ends_kernel(const __grid_constant__ BackwardCall call) {
  const Team<EndsShape<T>::kThreads> team{static_cast<int>(threadIdx.x), 1};
  const int64_t blocks = EndsShape<T>::blocks(call.p);
  ends_tile<T>(team, call, blockIdx.x / blocks, blockIdx.x % blocks, fastlm::cuda::shared_memory());
}

}  // namespace fastlm::selective_scan::cuda
