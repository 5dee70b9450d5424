// A product of the step: tiles of 8 rows of the weight, its columns shared out to the warps of a block, whose sums are added in
// the order of the warps. Each block normalises the tokens by itself (they are few, and lie in the second-level cache); residual
// add, gate and convolution are done where the sums are. Bits of a token do not depend on the tokens beside it. Bound by the
// memory of the weights.
#pragma once

#include "ops/samba_decode_step/cuda/weights.cuh"

namespace fastlm::samba_decode_step::cuda {
namespace {

using fastlm::cuda::sigmoid;

__device__ __forceinline__ float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// Tokens [first, first + count) of hidden, normalised, into `to` (shared memory), 0 beyond the last column.
template <class T>
__device__ __forceinline__ void stage_normalized(const Product& p, int first, int count, T* to, acc_t<T>* partial,
                                                 const BlockTeam& team) {
  using A = acc_t<T>;
  const A* const hidden = static_cast<const A*>(p.hidden) + first * p.columns;
  for (int t = 0; t < count; ++t) {
    A sum = 0;
    for (int64_t i = team.thread; i < p.columns; i += kThreads) {
      const A x = hidden[t * p.columns + i];
      sum += x * x;
    }
    sum = fastlm::cuda::warp_sum(sum);
    if (team.thread % 32 == 0) partial[t * kWarps + team.thread / 32] = sum;
  }
  team.sync();
  for (int t = 0; t < count; ++t) {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += partial[t * kWarps + i];
    const A scale = inverse_root(sum / static_cast<A>(p.columns) + static_cast<A>(p.eps));
    for (int64_t i = team.thread; i < p.chunks * chunk_columns(sizeof(T)); i += kThreads) {
      A x = 0;
      if (i < p.columns) x = hidden[t * p.columns + i] * scale * load_param<A>(p.norm, p.norm_dtype, i * p.norm_stride);
      to[t * p.staged_stride + i] = from_acc<T>(x);
    }
  }
  team.sync();
}

// One channel of one token through the convolution (as causal_conv1d_update does it): its new input is `x`.
template <class T>
__device__ __forceinline__ acc_t<T> convolve(const causal_conv1d::UpdateParams& p, int64_t token, int64_t d, T x) {
  using A = acc_t<T>;
  T* const state = static_cast<T*>(p.conv_state) + token * p.state_batch_stride + d * p.state_dim_stride;
  const auto weight = [&](int64_t j) {
    return load_param<A>(p.weight, p.weight_dtype, d * p.weight_dim_stride + j * p.weight_width_stride);
  };
  A sum = load_param<A>(p.bias, p.bias_dtype, d * p.bias_stride);
  const int64_t before = p.state_len - (p.width - 1);  // of the state that the filter does not see
  for (int64_t i = 0; i < p.state_len; ++i) {
    const T value = state[i * p.state_len_stride];
    if (i >= before) sum += weight(i - before) * to_acc(value);
    if (i > 0) state[(i - 1) * p.state_len_stride] = value;
  }
  if (p.state_len > 0) state[(p.state_len - 1) * p.state_len_stride] = x;
  sum += weight(p.width - 1) * to_acc(x);
  return p.silu ? sum * sigmoid(sum) : sum;
}

// `value(j)`: the sum of row j of the tile. `token` counts from the batch's first one.
template <class T, class Value>
__device__ __forceinline__ void use_sum(const Product& p, const causal_conv1d::UpdateParams& conv, int row_tile, int split,
                                        int token, int j, const Value& value) {
  using A = acc_t<T>;
  const int i = weight_of_tile(p, row_tile);
  const Weight& w = p.weights[i];
  if (p.use == Use::kGate) {
    const int64_t row = int64_t{row_tile} * (kTileRows / 2) + j;
    if (j >= kTileRows / 2 || row >= w.rows) return;
    const A opened = to_acc(from_acc<T>(value(j))), gated = to_acc(from_acc<T>(value(j + kTileRows / 2)));
    const A silu = to_acc(from_acc<T>(opened * sigmoid(opened)));
    static_cast<T*>(w.y)[token * w.y_stride + row] = from_acc<T>(silu * gated);
    return;
  }
  const int64_t row = int64_t{row_tile - w.first_tile} * kTileRows + j;
  if (row >= w.rows) return;
  const A sum = value(j);
  if (p.use == Use::kPartial) {
    static_cast<A*>(w.y)[(int64_t{split} * p.batch + token) * w.rows + row] = sum;
    return;
  }
  const T rounded = from_acc<T>(sum);
  if (p.use == Use::kAdd) {
    static_cast<A*>(w.y)[token * w.y_stride + row] = static_cast<const A*>(p.base)[token * w.y_stride + row] + to_acc(rounded);
  } else if (p.use == Use::kConv) {
    if (row < conv.dim) {
      static_cast<T*>(w.y)[token * w.y_stride + row] = from_acc<T>(convolve(conv, token, row, rounded));
    } else {
      static_cast<T*>(p.z)[token * p.z_stride + row - conv.dim] = rounded;
    }
  } else {
    static_cast<T*>(w.y)[token * w.y_stride + row] = rounded;
  }
}

// How the work of a product is shared out to `blocks` blocks and their warps.
__device__ __forceinline__ Share product_share(int block, int blocks, const BlockTeam& team) {
  return {block, blocks, team.thread / 32, kWarps};
}

// The product, by `blocks` blocks. `stream` has begun for the first group of tokens. `shared`: behind the stages.
template <class T>
__device__ __forceinline__ void run_product(const Product& p, const causal_conv1d::UpdateParams& conv, WeightStream<T>& stream,
                                            Piece<T>* slots, int block, int blocks, const BlockTeam& team, char* shared) {
  using A = acc_t<T>;
  A* const sums = reinterpret_cast<A*>(shared);
  A* const partial = reinterpret_cast<A*>(shared + kSumBytes);
  T* const staged = reinterpret_cast<T*>(shared + kSumBytes + kNormBytes);
  const int warp = team.thread / 32, lane = team.thread % 32, tiles = p.row_tiles * p.splits;
  constexpr int kSums = kTokens<T> * kTileRows;  // of a warp
  for (int i = block * kThreads + team.thread; i < p.num_zeroed; i += blocks * kThreads) p.zeroed[i] = 0;
  int buffer = 0;
  for (int first = 0; first < p.batch; first += p.group) {
    const int count = min(p.group, p.batch - first);
    if (first > 0) stream.begin(p, product_share(block, blocks, team), slots, team.thread);
    TokenRows<T> rows{static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, static_cast<int>(p.columns), count,
                      p.x_vector};
    if (p.hidden != nullptr) {
      stage_normalized(p, first, count, staged, partial, team);
      rows = {staged, p.staged_stride, p.chunks * chunk_columns(sizeof(T)), count, true};
    }
    for (int tile = block; tile < tiles; tile += blocks) {
      const int split = p.splits == 1 ? 0 : tile / p.row_tiles, row_tile = tile - split * p.row_tiles;
      TileSums<T> d;
      multiply_tile(p, stream, rows, split * p.split_chunks + warp, min((split + 1) * p.split_chunks, p.chunks), kWarps, lane, d);
      A* const all = sums + buffer * kWarps * kSums;
      d.put(all + warp * kSums, lane);
      team.sync();  // also between the last use of the other buffer and its next one
      buffer ^= 1;
      for (int e = team.thread; e < count * kTileRows; e += kThreads) {
        const int token = e / kTileRows;
        const auto value = [&](int j) {
          A sum = 0;
#pragma unroll
          for (int i = 0; i < kWarps; ++i) sum += all[i * kSums + token * kTileRows + j];
          return sum;
        };
        use_sum<T>(p, conv, row_tile, split, first + token, e % kTileRows, value);
      }
    }
    if (p.hidden != nullptr) team.sync();  // before other tokens take the place of these
  }
}

}  // namespace
}  // namespace fastlm::samba_decode_step::cuda
