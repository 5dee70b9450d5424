// What the two-team forward scan does around the recurrence where a call is what most are: all tensors contiguous along channels
// or states, aligned, blocks of channels full, N = 16. Every thread has one piece of 16 bytes of each tile; nothing is left to
// decide but whether there is a gate and a softplus. For whole tiles.
#pragma once

#include "ops/selective_scan/cuda/forward_sides.cuh"

namespace fastlm::selective_scan::cuda {

template <class Shape>
struct RowTiles {
  using T = typename Shape::T;
  using A = typename Shape::A;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kRow = Shape::kChannels / kVector;
  static constexpr int kStatePieces = Shape::kSteps * Shape::kStates / kVector, kBytes = Shape::Channels::kBytes;
  static_assert(Shape::kSteps * kRow == Shape::kThreads && 2 * kStatePieces == Shape::kThreads);

  int thread;
  const T *u, *delta, *z;
  const T* state;  // of B for one half of the threads, of C for the other
  int64_t state_stride;
  T* out;

  static __device__ __forceinline__ bool applies(const ForwardCall& call, const Stretch& s) {
    const ForwardParams& p = call.p;
    const Orders& o = call.order;
    const bool rows = o.u == Order::kRows && o.delta == Order::kRows && (p.z.data == nullptr || o.z == Order::kRows) &&
                      o.B == Order::kRows && o.C == Order::kRows && o.out == Order::kRows;
    return rows && p.out.seq_stride * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(first_out(call, s)) % 16 == 0;
  }
  static __device__ __forceinline__ T* first_out(const ForwardCall& call, const Stretch& s) {
    const ForwardParams& p = call.p;
    return static_cast<T*>(p.out.data) + s.sequence.batch * p.out.batch_stride + s.channel + s.begin * p.out.seq_stride;
  }

  __device__ __forceinline__ RowTiles(const ForwardCall& call, const Stretch& s, const TileMovers<Shape>& movers, int thread)
      : thread(thread), u(movers.u.from), delta(movers.delta.from), z(movers.z.from) {
    const ForwardParams& p = call.p;
    const bool second = thread >= kStatePieces;
    const Source<T> source = TileMovers<Shape>::states(call, second ? p.C : p.B, Order::kRows, s);
    constexpr int kStateRow = Shape::kStates / kVector;
    const int piece = thread % kStatePieces;
    state_stride = source.step_stride;
    state = source.data + piece / kStateRow * source.step_stride + piece % kStateRow * kVector;
    out = first_out(call, s) + thread / kRow * p.out.seq_stride + thread % kRow * kVector;
  }

  // Puts the next tile on its way.
  __device__ __forceinline__ void copy(const ForwardCall& call, char* to) {
    const ForwardParams& p = call.p;
    char* own = to + thread * 16;
    fastlm::cuda::copy_async<16>(own, u);
    fastlm::cuda::copy_async<16>(own + kBytes, delta);
    fastlm::cuda::copy_async<16>(to + 3 * kBytes + thread / kStatePieces * Shape::States::kBytes + thread % kStatePieces * 16,
                                 state);
    if (p.z.data != nullptr) {
      fastlm::cuda::copy_async<16>(own + 2 * kBytes, z);
      z += Shape::kSteps * p.z.seq_stride;
    }
    fastlm::cuda::commit_copies();
    u += Shape::kSteps * p.u.seq_stride;
    delta += Shape::kSteps * p.delta.seq_stride;
    state += Shape::kSteps * state_stride;
  }

  template <bool kSoftplus>
  __device__ __forceinline__ void prepare_steps(const char* raw, const A* params, A* pairs) const {
    constexpr int kPairs = Shape::kChannels / 2, kLines = Shape::kThreads / kPairs;
    const int channel = thread % kPairs * 2, at = thread / kPairs * Shape::kChannels + channel;
    const T *u_at = reinterpret_cast<const T*>(raw) + at, *delta_at = reinterpret_cast<const T*>(raw + kBytes) + at;
    A bias[2];
    load_elements<2>(bias, params + channel);
#pragma unroll
    for (int i = 0; i < Shape::kSteps / kLines; ++i) {
      A dt[2], x[2];
      load_elements<2>(dt, delta_at + i * kLines * Shape::kChannels);
      load_elements<2>(x, u_at + i * kLines * Shape::kChannels);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dt[j] += bias[j];
        if constexpr (kSoftplus) dt[j] = softplus<sizeof(T) != 2>(dt[j]);
      }
      *reinterpret_cast<float4*>(pairs + (at + i * kLines * Shape::kChannels) * 2) =
          make_float4(dt[0], dt[0] * x[0], dt[1], dt[1] * x[1]);
    }
  }
  __device__ __forceinline__ void prepare(const ForwardCall& call, const char* raw, const A* params, A* pairs, A* B, A* C) const {
    if (call.p.delta_softplus) {
      prepare_steps<true>(raw, params, pairs);
    } else {
      prepare_steps<false>(raw, params, pairs);
    }
    const T *b = reinterpret_cast<const T*>(raw + 3 * kBytes) + thread * 4,
            *c = reinterpret_cast<const T*>(raw + 3 * kBytes + Shape::States::kBytes) + thread * 4;
#pragma unroll
    for (int i = 0; i + thread * 4 < Shape::kSteps * Shape::kStates; i += Shape::kThreads * 4) {
      A x[4], y[4];
      load_elements<4>(x, b + i);
      load_elements<4>(y, c + i);
      *reinterpret_cast<float4*>(B + i + thread * 4) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(C + i + thread * 4) = make_float4(y[0], y[1], y[2], y[3]);
    }
  }

  template <bool kGated>
  __device__ __forceinline__ void finish(const char* raw, const A* params, const A* sums) const {
    const int channel = thread % kRow * kVector;
    const A *sum = sums + thread / kRow * Shape::kSumStride + channel, *skip = params + Shape::kChannels + channel;
    A x[kVector], y[kVector];
    load_elements<kVector>(x, reinterpret_cast<const T*>(raw) + thread * kVector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = fastlm::cuda::multiply_add(skip[i], x[i], sum[i]);
    if constexpr (kGated) {
      A gate[kVector];
      load_elements<kVector>(gate, reinterpret_cast<const T*>(raw + 2 * kBytes) + thread * kVector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] *= silu(gate[i]);
    }
    store_vector<T>(out, y);
  }
  // Skip connection, gate and store of the next tile.
  __device__ __forceinline__ void store(const ForwardCall& call, const char* raw, const A* params, const A* sums) {
    if (call.p.z.data != nullptr) {
      finish<true>(raw, params, sums);
    } else {
      finish<false>(raw, params, sums);
    }
    out += Shape::kSteps * call.p.out.seq_stride;
  }
};

}  // namespace fastlm::selective_scan::cuda
