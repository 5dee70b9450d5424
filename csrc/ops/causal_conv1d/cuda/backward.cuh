// Depthwise causal convolution on CUDA, backward (formulas: ../cpu/backward.cpp), along channels. Bound by DRAM: x and dout read,
// dx written, once each.
//
// A thread moves along a piece of time with two windows: the inputs, from which dp_t is computed again, and the last W values of
// dp, from which dx_{t-(W-1)} follows. A block has kWarps pieces, one after the other in time; it adds their weight gradients and
// writes one partial sum, and reduce_partial adds those in order: no atomics, the same bits always. With 256 positions to a
// block the partial sums of bf16 are 1.3 % of the activations' bytes.
#pragma once

#include "ops/causal_conv1d/cuda/segments.cuh"
#include "ops/causal_conv1d/cuda/tiling.h"

namespace fastlm::causal_conv1d::cuda {

// What the final state's gradient adds at position t of the segment (before its begin: to the initial state).
template <class T>
__device__ __forceinline__ acc_t<T> from_final_state(const BackwardParams& p, const Bounds& s, int64_t channel, int64_t t) {
  const int64_t keep = p.width - 1;
  const int64_t i = t - (s.end - keep);
  if (p.dfinal_states == nullptr || s.final_state < 0 || i < 0 || i >= keep) return acc_t<T>(0);
  return to_acc(static_cast<const T*>(p.dfinal_states)[(s.final_state * p.dim + channel) * keep + i]);
}

// dx at [begin, end), which lies in segment s, for the thread's channels from `channel` on. Adds to dw[0..W-1] and, at dw[W], to
// the bias gradient.
template <class T, int kWidth, int kLanes, class FilterT, class Window, class Sums>
__device__ __forceinline__ void backward_run(const BackwardParams& p, int width, FilterT& filter, Window& tap, Window& dp,
                                             Sums& dw, const Bounds& s, int64_t batch, int64_t channel, int64_t begin,
                                             int64_t end) {
  using A = acc_t<T>;
  const int keep = width - 1;
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel * p.x_dim_stride + begin * p.x_seq_stride;
  const T* dout =
      static_cast<const T*>(p.dout) + batch * p.dout_batch_stride + channel * p.dout_dim_stride + begin * p.dout_seq_stride;
  T* dx = static_cast<T*>(p.dx) + batch * p.dx_batch_stride + channel * p.dx_dim_stride + begin * p.dx_seq_stride;

  // The next dx, from `sum` on.
  const auto emit = [&](A(&sum)[kLanes], bool padding) {
    Elements<T, kLanes> result;
    if (!padding) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j) sum[i] = multiply_add(filter.weight(j, i), dp(width - 1 - j, i), sum[i]);
      }
    }
    result.set(sum);
    result.store(dx);
    dx += p.dx_seq_stride;
  };
  const auto emit_with_final = [&](int64_t t) {
    A sum[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum[i] = from_final_state<T>(p, s, channel + i, t);
    emit(sum, s.padding);
  };
  if (s.padding) {
    for (int64_t t = begin; t < end; ++t) emit_with_final(t);
    return;
  }

  const auto step = [&](const Elements<T, kLanes>& in, const Elements<T, kLanes>& grad, bool counts) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      tap(width - 1, i) = in.get(i);
      A sum = filter.bias[i];
#pragma unroll
      for (int j = 0; j < width; ++j) sum = multiply_add(filter.weight(j, i), tap(j, i), sum);
      const A g = before_activation(grad.get(i), sum, p.silu);
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) dp(j, i) = dp(j + 1, i);
      dp(width - 1, i) = g;
      if (counts) {
#pragma unroll
        for (int j = 0; j < width; ++j) dw(j, i) = multiply_add(g, tap(j, i), dw(j, i));
        dw(width, i) += g;
      }
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) tap(j, i) = tap(j + 1, i);
    }
  };
  const auto emit_next = [&] {
    A sum[kLanes] = {};
    emit(sum, false);
  };

  start_window<T, kLanes>(p, width, s, batch, channel, begin, tap);
#pragma unroll
  for (int j = 0; j < width; ++j) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) dp(j, i) = A(0);
  }
  constexpr int kRows = sizeof(T) == 2 ? kUnroll : kUnroll / 2;  // the same bytes under way for every type
  // Positions of the run, counted from its begin: 0 to n. dx at n-1 takes dp up to `last`.
  const int n = static_cast<int>(end - begin);
  const int last = static_cast<int>(min(end + keep, s.end) - begin);
  for (int t = 0; t < last; t += kRows) {
    Elements<T, kLanes> in[kRows], grad[kRows];
    if (t >= keep && t + kRows <= n) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        in[u].load(x + u * p.x_seq_stride);
        grad[u].load(dout + u * p.dout_seq_stride);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        step(in[u], grad[u], true);
        emit_next();
      }
    } else {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int source = min(u, last - 1 - t);
        in[u].load(x + source * p.x_seq_stride);
        grad[u].load(dout + source * p.dout_seq_stride);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (t + u < last) {
          step(in[u], grad[u], t + u < n);
          if (t + u >= keep) emit_next();
        }
      }
    }
    x += kRows * p.x_seq_stride;
    dout += kRows * p.dout_seq_stride;
  }
  for (int t = last; t < n + keep; ++t) {  // the segment's last positions: nothing comes after them
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) dp(j, i) = dp(j + 1, i);
      dp(width - 1, i) = A(0);
    }
    if (t >= keep) emit_with_final(begin + t - keep);
  }
}

template <class T, int kWidth, int kLanes, int kThreads, class Sums>
__device__ __forceinline__ void backward_piece(const BackwardParams& p, int width, Sums& dw, int64_t batch, int64_t channel,
                                               int64_t t0, int64_t t1) {
  using A = acc_t<T>;
  Filter<A, kWidth, kLanes, kThreads> filter;
  Taps<A, kWidth, kWidth, kLanes, kThreads> tap, dp;
  place(filter.weight, width + 1, static_cast<int>(threadIdx.x));
  place(tap, 2 * width + 1, static_cast<int>(threadIdx.x));
  place(dp, 3 * width + 1, static_cast<int>(threadIdx.x));
  filter.load(p, width, channel);
  for (int64_t t = t0; t < t1;) {
    const Bounds s = bounds_at(p, batch, t, t1 + width - 1);
    const int64_t end = min(s.end, t1);
    backward_run<T, kWidth, kLanes>(p, width, filter, tap, dp, dw, s, batch, channel, t, end);
    t = end;
  }
}

// Element `item` of the initial states' gradient (S, D, W-1): the formula of dx at the W-1 positions before each segment. dp is
// computed again there, at most W-1 values.
template <class T>
__device__ __forceinline__ void initial_state_grad(const BackwardParams& p, int64_t num_states, int64_t item) {
  using A = acc_t<T>;
  const int64_t keep = p.width - 1;
  if (item >= num_states * p.dim * keep) return;
  const int64_t channel = item / keep % p.dim;
  int64_t batch;
  const Bounds s = segment_of_state(p, item / keep / p.dim, true, batch);
  const int64_t t = s.begin - keep + item % keep;
  const auto weight = [&](int64_t j) {
    return load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + j * p.weight_width_stride);
  };
  const T* dout = static_cast<const T*>(p.dout) + batch * p.dout_batch_stride + channel * p.dout_dim_stride;
  A sum = from_final_state<T>(p, s, channel, t);
  for (int64_t j = 0; j < p.width; ++j) {
    const int64_t source = t + keep - j;
    if (s.padding || source < s.begin || source >= s.end) continue;
    A pre = load_param<A>(p.bias, p.bias_dtype, channel * p.bias_stride);
    for (int64_t k = 0; k < p.width; ++k) {
      pre = multiply_add(weight(k), input_at<T>(p, s, batch, channel, source - keep + k), pre);
    }
    sum = multiply_add(weight(j), before_activation(to_acc(dout[source * p.dout_seq_stride]), pre, p.silu), sum);
  }
  static_cast<T*>(p.dinitial_states)[item] = from_acc<T>(sum);
}

constexpr int backward_threads(int width) { return width > 0 ? 128 : 64; }

// Grid: tiles of 32 * kLanes channels and as many pieces of `steps` positions as the block has warps; then the initial states.
// Four blocks to a multiprocessor: 128 registers.
template <class T, int kWidth, int kLanes>
__global__ void __launch_bounds__(backward_threads(kWidth), kWidth > 0 ? 4 : 1)
    backward_rows(const BackwardParams p, const Tiling tiling) {
  using A = acc_t<T>;
  constexpr int kThreads = backward_threads(kWidth);
  constexpr int kWarps = kThreads / 32;
  if (blockIdx.x >= tiling.tiles) {
    return initial_state_grad<T>(p, tiling.num_states, static_cast<int64_t>(blockIdx.x - tiling.tiles) * kThreads + threadIdx.x);
  }
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t piece = blockIdx.x / tiling.channel_blocks;  // counted through the batch
  const uint32_t batch = piece / tiling.pieces;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x % tiling.channel_blocks) * (32 * kLanes);
  const int64_t channel = first_channel + thread % 32 * kLanes;
  const int64_t t0 = (static_cast<int64_t>(piece % tiling.pieces) * kWarps + thread / 32) * tiling.steps;

  Taps<A, kWidth, kWidth + 1, kLanes, kThreads> dw;
  place(dw, 0, thread);
#pragma unroll
  for (int j = 0; j <= width; ++j) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) dw(j, i) = A(0);
  }
  if (channel < p.dim && t0 < p.seqlen) {
    backward_piece<T, kWidth, kLanes, kThreads>(p, width, dw, batch, channel, t0, min(t0 + tiling.steps, p.seqlen));
  }

  // sums[j][warp][lane][i]: where a Column has them already.
  A* sums = reinterpret_cast<A*>(fastlm::cuda::shared_memory());
  if constexpr (kWidth > 0) {
#pragma unroll
    for (int j = 0; j <= width; ++j) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) sums[(j * kThreads + thread) * kLanes + i] = dw(j, i);
    }
  }
  __syncthreads();
  A* partial = static_cast<A*>(p.partial) + static_cast<int64_t>(piece) * (width + 1) * p.dim;
  for (int item = thread; item < (width + 1) * 32 * kLanes; item += kThreads) {
    const int j = item / (32 * kLanes);
    const int c = item % (32 * kLanes);
    A sum = A(0);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[(j * kWarps + warp) * 32 * kLanes + c];
    if (first_channel + c < p.dim) partial[j * p.dim + first_channel + c] = sum;
  }
}

constexpr int kReduceColumns = 32;
constexpr int kReduceGroups = 8;

// Sums of the pieces, (P, W + 1, D) -> dweight (D, W) and dbias (D,) or null. A block has 32 columns; group g of its threads adds
// pieces g, g + 8, ..., and the groups are added in order.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceGroups)
    reduce_partial(const BackwardParams p, int64_t pieces, void* dweight, void* dbias) {
  A* sums = reinterpret_cast<A*>(fastlm::cuda::shared_memory());
  const int64_t columns = (p.width + 1) * p.dim;
  const int group = static_cast<int>(threadIdx.x) / kReduceColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x % kReduceColumns;
  A sum = A(0);
  if (column < columns) {
    const A* partial = static_cast<const A*>(p.partial) + column;
#pragma unroll 4
    for (int64_t i = group; i < pieces; i += kReduceGroups) sum += partial[i * columns];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0 || column >= columns) return;
#pragma unroll
  for (int g = 1; g < kReduceGroups; ++g) sum += sums[g * kReduceColumns + threadIdx.x];
  const int64_t j = column / p.dim;
  const int64_t channel = column % p.dim;
  if (j < p.width) {
    fastlm::cuda::store_param(dweight, p.weight_dtype, channel * p.width + j, sum);
  } else if (dbias != nullptr) {
    fastlm::cuda::store_param(dbias, p.bias_dtype, channel, sum);
  }
}

}  // namespace fastlm::causal_conv1d::cuda
