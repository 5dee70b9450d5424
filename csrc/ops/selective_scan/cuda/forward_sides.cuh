// The forward scan on CUDA, third part: what is done to a tile before the recurrence (step sizes, B and C in the accumulation
// type: once instead of in each lane of a channel) and after it (skip connection, gate, store), by a team of 128 threads.
//
// Both go over neighbouring elements in the order they lie in, several at once, where tensors are contiguous along channels or
// along time; anything else one by one.
#pragma once

#include "ops/selective_scan/cuda/forward_stage.cuh"
#include "ops/selective_scan/cuda/functions.cuh"

namespace fastlm::selective_scan::cuda {

// delta_bias and D of a team's channels: read from global memory once, not for every tile. A barrier before they are used.
template <class Shape>
__device__ __forceinline__ void load_channel_params(const Team<128>& team, const ForwardCall& call, const Stretch& s,
                                                    typename Shape::A* params) {
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  for (int i = team.thread; i < 2 * Shape::kChannels; i += Shape::kThreads) {
    const int channel = i % Shape::kChannels;
    A x = A(0);
    if (channel < s.channels) {
      const int64_t d = s.channel + channel;
      x = i < Shape::kChannels ? fastlm::cuda::load_param<A>(p.delta_bias.data, p.delta_bias.dtype, d * p.delta_bias.dim_stride)
                               : fastlm::cuda::load_param<A>(p.D.data, p.D.dtype, d * p.D.dim_stride);
    }
    params[i] = x;
  }
}

// Steps (dt, dt u) of a tile, B and C. Past `steps` all is 0: the state stays as it is there.
template <class Shape>
__device__ __forceinline__ void prepare_tile(const Team<128>& team, const ForwardCall& call, int steps, const char* raw,
                                             const typename Shape::A* params, typename Shape::A* pairs, typename Shape::A* B,
                                             typename Shape::A* C) {
  using T = typename Shape::T;
  using A = typename Shape::A;
  const ForwardParams& p = call.p;
  constexpr int kBytes = Shape::Channels::kBytes, kPairs = Shape::kChannels / 2;
  const char *raw_u = raw, *raw_delta = raw + kBytes;
  const auto step_of = [&](int t, A delta, A bias) {
    A dt = delta + bias;
    if (p.delta_softplus) dt = softplus<sizeof(T) != 2>(dt);
    return t >= steps ? A(0) : dt;
  };
  bool done = false;
  if constexpr (sizeof(A) == 4 && Shape::kThreads % kPairs == 0) {
    if (call.order.u != Order::kColumns && call.order.delta != Order::kColumns) {
      const int channel = team.thread % kPairs * 2;
      A bias[2];
      load_elements<2>(bias, params + channel);
#pragma unroll 2
      for (int t = team.thread / kPairs; t < Shape::kSteps; t += Shape::kThreads / kPairs) {
        const int at = t * Shape::kChannels + channel;
        A delta[2], u[2];
        load_elements<2>(delta, reinterpret_cast<const T*>(raw_delta) + at);
        load_elements<2>(u, reinterpret_cast<const T*>(raw_u) + at);
        const A first = step_of(t, delta[0], bias[0]), second = step_of(t, delta[1], bias[1]);
        *reinterpret_cast<float4*>(pairs + at * 2) = make_float4(first, first * u[0], second, second * u[1]);
      }
      done = true;
    }
  }
  if (!done) {
    const Staged<T, Shape::kSteps, Shape::kChannels> u(raw_u, call.order.u), delta(raw_delta, call.order.delta);
    const int channel = team.thread % Shape::kChannels;
    const A bias = params[channel];
#pragma unroll 1
    for (int t = team.thread / Shape::kChannels; t < Shape::kSteps; t += Shape::kThreads / Shape::kChannels) {
      A* pair = pairs + (t * Shape::kChannels + channel) * 2;
      const A dt = step_of(t, delta.at(t, channel), bias);
      pair[0] = dt;
      pair[1] = dt * u.at(t, channel);
    }
  }

  const auto convert = [&](const char* from, Order order, A* to) {
    if constexpr (sizeof(A) == 4) {
      if (order != Order::kColumns) {
#pragma unroll
        for (int i = team.thread * 4; i < Shape::kSteps * Shape::kStates; i += Shape::kThreads * 4) {
          A x[4];
          load_elements<4>(x, reinterpret_cast<const T*>(from) + i);
          *reinterpret_cast<float4*>(to + i) = make_float4(x[0], x[1], x[2], x[3]);
        }
        return;
      }
    }
    const Staged<T, Shape::kSteps, Shape::kStates> x(from, order);
#pragma unroll 2
    for (int i = team.thread; i < Shape::kSteps * Shape::kStates; i += Shape::kThreads) {
      to[i] = x.at(i / Shape::kStates, i % Shape::kStates);
    }
  };
  if (!p.B.constant) convert(raw + 3 * kBytes, call.order.B, B);
  if (!p.C.constant && !call.ends_only) convert(raw + 3 * kBytes + Shape::States::kBytes, call.order.C, C);
}

// 16 bytes of elements by one store.
template <class T>
__device__ __forceinline__ void store_vector(T* to, const acc_t<T> (&x)[16 / sizeof(T)]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      word[i] = fastlm::cuda::pack_pair<T>(x[2 * i], x[2 * i + 1]);
    } else {
      word[i] = __float_as_uint(x[i]);
    }
  }
  fastlm::cuda::store_words<16>(to, word);
}

// Skip connection, gate and store; sums: those of the recurrence.
template <class Shape>
struct Output {
  using T = typename Shape::T;
  using A = typename Shape::A;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr bool kRowVectors = sizeof(A) == 4 && Shape::kChannels % kVector == 0;
  static constexpr bool kColumnVectors = sizeof(A) == 4 && Shape::kSteps % kVector == 0;
  using Tensor = Staged<T, Shape::kSteps, Shape::kChannels>;

  const Team<128>& team;
  const ForwardCall& call;
  const char *raw_u, *raw_z;
  const A *skip, *sums;
  T* out;
  bool gated;

  __device__ __forceinline__ A value(A u, A z, A sum, A d) const {
    const A y = fastlm::cuda::multiply_add(d, u, sum);
    return gated ? y * silu(z) : y;
  }

  // Vectors along channels (or time), which lie in a row of every tensor of that order.
  template <bool kColumns>
  __device__ __forceinline__ void vectors(int steps, int channels) const {
    const ForwardParams& p = call.p;
    constexpr Order kOrder = kColumns ? Order::kColumns : Order::kRows;
    constexpr int kPieces = (kColumns ? Shape::kSteps : Shape::kChannels) / kVector;
    constexpr int kLines = kColumns ? Shape::kChannels : Shape::kSteps;
    const Tensor u(raw_u, call.order.u), z(raw_z, call.order.z);
    const auto read = [&](A(&to)[kVector], const Tensor& from, Order order, int t, int channel) {
      if (order == kOrder) {
        load_elements<kVector>(to, from.tile + t * from.step_stride + channel * from.column_stride);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) to[i] = from.at(kColumns ? t + i : t, kColumns ? channel : channel + i);
      }
    };
    const int first = team.thread % kPieces * kVector;
#pragma unroll 1
    for (int line = team.thread / kPieces; line < kLines; line += Shape::kThreads / kPieces) {
      const int t = kColumns ? first : line, channel = kColumns ? line : first;
      if (t >= steps || channel >= channels) break;
      A x[kVector], gate[kVector], y[kVector];
      read(x, u, call.order.u, t, channel);
      if (gated) {
        read(gate, z, call.order.z, t, channel);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) gate[i] = A(0);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int ti = kColumns ? t + i : t, ci = kColumns ? channel : channel + i;
        y[i] = value(x[i], gate[i], sums[ti * Shape::kSumStride + ci], skip[ci]);
      }
      store_vector<T>(out + t * p.out.seq_stride + channel * p.out.dim_stride, y);
    }
  }

  __device__ __forceinline__ void store(int steps, int channels) const {
    const ForwardParams& p = call.p;
    const auto aligned = [&](int64_t stride) {
      return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(stride) * sizeof(T)) % 16 == 0;
    };
    if constexpr (kRowVectors) {
      if (call.order.out == Order::kRows && channels % kVector == 0 && aligned(p.out.seq_stride)) {
        vectors<false>(steps, channels);
        return;
      }
    }
    if constexpr (kColumnVectors) {
      if (call.order.out == Order::kColumns && steps == Shape::kSteps && aligned(p.out.dim_stride)) {
        vectors<true>(steps, channels);
        return;
      }
    }
    const Tensor u(raw_u, call.order.u), z(raw_z, call.order.z);
    const bool by_columns = call.order.out == Order::kColumns;
#pragma unroll 1
    for (int i = team.thread; i < Shape::kSteps * Shape::kChannels; i += Shape::kThreads) {
      const int t = by_columns ? i % Shape::kSteps : i / Shape::kChannels;
      const int channel = by_columns ? i / Shape::kSteps : i % Shape::kChannels;
      if (t < steps && channel < channels) {
        const A y =
            value(u.at(t, channel), gated ? z.at(t, channel) : A(0), sums[t * Shape::kSumStride + channel], skip[channel]);
        out[t * p.out.seq_stride + channel * p.out.dim_stride] = fastlm::cuda::from_acc<T>(y);
      }
    }
  }
};

template <class Shape>
__device__ __forceinline__ void store_tile(const Team<128>& team, const ForwardCall& call, const Stretch& s, int64_t t0,
                                           int steps, const char* raw, const typename Shape::A* params,
                                           const typename Shape::A* sums) {
  using T = typename Shape::T;
  const ForwardParams& p = call.p;
  T* out =
      static_cast<T*>(p.out.data) + s.sequence.batch * p.out.batch_stride + s.channel * p.out.dim_stride + t0 * p.out.seq_stride;
  const Output<Shape> output{
      team, call, raw, raw + 2 * Shape::Channels::kBytes, params + Shape::kChannels, sums, out, p.z.data != nullptr};
  output.store(steps, s.channels);
}

}  // namespace fastlm::selective_scan::cuda
