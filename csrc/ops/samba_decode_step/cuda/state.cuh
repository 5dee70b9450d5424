// The state update of the step: a warp takes 8 channels, four lanes each. dt = low W^T by the lanes together, then
// h = exp(dt A) h + dt u B, y = (C h + D u) silu(z), arithmetic and order as in selective_state_update. Every block forms low, B
// and C from the partial sums of the product before. Bound by latency at a few tokens, by the memory of the states at many.
#pragma once

#include "ops/samba_decode_step/cuda/weights.cuh"
#include "ops/selective_scan/cuda/step.cuh"

namespace fastlm::samba_decode_step::cuda {
namespace {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Spread over the blocks first: few warps in each.
__device__ __forceinline__ Share state_share(int block, int blocks, const BlockTeam& team) {
  return {team.thread / 32 * blocks + block, kWarps * blocks, 0, 1};
}

// One channel of one token; four lanes, lane c of them with states 4 c to 4 c + 3 of every 16. `dt` is rounded, without its bias.
template <class T>
__device__ __forceinline__ void update_state(const StateUpdate& p, int64_t token, int64_t d, bool real, int c, acc_t<T> dt,
                                             const acc_t<T>* b, const acc_t<T>* c_row) {
  using A = acc_t<T>;
  namespace scan = selective_scan::cuda;
  const A step = scan::step_size<T>(dt + load_param<A>(p.bias, p.bias_dtype, d * p.bias_stride), true);
  const A u = to_acc(static_cast<const T*>(p.u)[token * p.u_stride + d]);
  const A in = step * u;
  const int64_t h0 = token * p.h_batch_stride + d * p.h_dim_stride;
  A sum = 0;
  for (int n0 = 4 * c; n0 < p.state; n0 += 16) {
    const int count = p.state - n0 < 4 ? p.state - n0 : 4;
    A h[4], decay[4], b4[4], c4[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      h[i] = decay[i] = b4[i] = c4[i] = A(0);
      if (i >= count) continue;
      h[i] = load_param<A>(p.h, p.h_dtype, h0 + (n0 + i) * p.h_state_stride);
      decay[i] = load_param<A>(p.A_log, p.A_dtype, d * p.A_dim_stride + (n0 + i) * p.A_state_stride);
      b4[i] = b[n0 + i];
      c4[i] = c_row[n0 + i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) decay[i] = scan::decay_of<A>(-exp_of(decay[i]));
    sum = scan::step_states(h, decay, step, in, b4, c4, sum, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count && real) fastlm::cuda::store_param(p.h, p.h_dtype, h0 + (n0 + i) * p.h_state_stride, h[i]);
    }
  }
  sum = scan::sum_lanes<4>(sum);
  if (c != 0 || !real) return;
  const A skip = load_param<A>(p.D, p.D_dtype, d * p.D_stride);
  const A z = to_acc(static_cast<const T*>(p.z)[token * p.z_stride + d]);
  static_cast<T*>(p.y)[token * p.y_stride + d] = from_acc<T>(scan::step_output(sum, skip, u, true, z));
}

// The states and decays of a tile of channels come from memory while the products with low are under way: lane 4 g + c asks for
// the token c of channel g, lane 4 g also for its decay. Of states longer than a line, the first line.
__device__ __forceinline__ void prefetch_states(const Product& dt, const StateUpdate& p, int tile, int first, int count,
                                                int lane) {
  const int64_t d = min(int64_t{tile} * kTileRows + lane / 4, dt.weights[0].rows - 1);
  const auto bytes = [](DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; };
  for (int t = lane % 4; t < count; t += 4) {
    fastlm::cuda::prefetch_l2(static_cast<const char*>(p.h) +
                              ((first + t) * p.h_batch_stride + d * p.h_dim_stride) * bytes(p.h_dtype));
  }
  if (lane % 4 == 0) fastlm::cuda::prefetch_l2(static_cast<const char*>(p.A_log) + d * p.A_dim_stride * bytes(p.A_dtype));
}

// All channels, by `blocks` blocks. `stream` has begun for the first group of tokens. `shared`: behind the stages.
template <class T>
__device__ __forceinline__ void run_state(const Product& dt, const StateUpdate& p, WeightStream<T>& stream, Piece<T>* slots,
                                          int block, int blocks, const BlockTeam& team, char* shared) {
  using A = acc_t<T>;
  const int warp = team.thread / 32, lane = team.thread % 32, g = lane / 4, c = lane % 4;
  const int rank = static_cast<int>(dt.columns), width = rank + 2 * p.state;
  A* const sums = reinterpret_cast<A*>(shared) + warp * kTokens<T> * kTileRows;
  T* const low = reinterpret_cast<T*>(shared + kSumBytes);                 // rows of whole vectors
  A* const vectors = reinterpret_cast<A*>(low + dt.group * p.low_stride);  // (tokens, 2 N): B, C
  const Share share = state_share(block, blocks, team);
  for (int first = 0; first < dt.batch; first += dt.group) {
    const int count = min(dt.group, dt.batch - first);
    if (first > 0) stream.begin(dt, share, slots, team.thread);
    const int padded = dt.chunks * chunk_columns(sizeof(T));
    for (int t = 0; t < count; ++t) {
      for (int i = team.thread; i < width; i += kThreads) {
        const A* from = static_cast<const A*>(p.low) + int64_t{first + t} * width + i;
        A sum = 0;
        for (int s = 0; s < p.splits; ++s) sum += from[int64_t{s} * dt.batch * width];
        const T rounded = from_acc<T>(sum);
        if (i < rank) {
          low[t * p.low_stride + i] = rounded;
        } else {
          vectors[t * 2 * p.state + i - rank] = to_acc(rounded);
        }
      }
      for (int i = rank + team.thread; i < padded; i += kThreads) low[t * p.low_stride + i] = from_acc<T>(0);
    }
    for (int tile = share.tile; tile < dt.row_tiles; tile += share.tile_step) prefetch_states(dt, p, tile, first, count, lane);
    team.sync();
    const TokenRows<T> rows{low, p.low_stride, padded, count, true};
    for (int tile = share.tile; tile < dt.row_tiles; tile += share.tile_step) {
      TileSums<T> d;
      multiply_tile(dt, stream, rows, 0, dt.chunks, 1, lane, d);
      __syncwarp();
      d.put(sums, lane);
      __syncwarp();
      const int64_t row = int64_t{tile} * kTileRows + g, dim = dt.weights[0].rows;
      const int64_t channel = row < dim ? row : dim - 1;
      for (int t = 0; t < count; ++t) {
        const A step = to_acc(from_acc<T>(sums[t * kTileRows + g]));
        const A* const b = vectors + t * 2 * p.state;
        update_state<T>(p, first + t, channel, row < dim, c, step, b, b + p.state);
      }
    }
    team.sync();
  }
}

}  // namespace
}  // namespace fastlm::samba_decode_step::cuda
