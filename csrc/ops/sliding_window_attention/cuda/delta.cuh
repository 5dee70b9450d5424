// row_delta of the backward pass: sum over K of dout * out, minus dlse. One row per 16 threads; bound by reading dout and out.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/sliding_window_attention/cuda/sequences.cuh"

namespace fastlm::sliding_window_attention::cuda {

constexpr int kDeltaThreads = 256, kDeltaLanes = 16;

// Elements [column, column + 8) of a row.
template <class T>
__device__ __forceinline__ void load_eight(float (&x)[8], const T* from) {
  const uint4 piece = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
}

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) row_delta(const __grid_constant__ BackwardParams p, int64_t rows, bool vectors) {
  using A = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  constexpr int kRows = kDeltaThreads / kDeltaLanes;
  const int64_t rounds = (rows + kRows - 1) / kRows;  // the lanes of a warp go round together
  for (int64_t round = blockIdx.x; round < rounds; round += gridDim.x) {
    const int64_t row = round * kRows + threadIdx.x / kDeltaLanes;
    const bool real = row < rows;
    const int64_t head = row % p.num_heads, position = row / p.num_heads % p.device.total_q;
    const int64_t batch = row / p.num_heads / p.device.total_q;
    A sum = A(0);
    if (real) {
      const T* dout = head_row<T>(p.dout, batch, position, head);
      const T* out = head_row<T>(p.out, batch, position, head);
      bool done = false;
      if constexpr (sizeof(T) == 2) {
        if (vectors) {
          for (int64_t k = 8 * lane; k < p.head_dim; k += 8 * kDeltaLanes) {
            float a[8], b[8];
            load_eight(a, dout + k);
            load_eight(b, out + k);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
          }
          done = true;
        }
      }
      if (!done) {
        // In the order of the pieces above, so that both add up the same.
        for (int64_t piece = 8 * lane; piece < p.head_dim; piece += 8 * kDeltaLanes) {
          for (int64_t k = piece; k < piece + 8 && k < p.head_dim; ++k) {
            sum += fastlm::cuda::to_acc(dout[k]) * fastlm::cuda::to_acc(out[k]);
          }
        }
      }
    }
#pragma unroll
    for (int distance = kDeltaLanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(fastlm::cuda::kFullWarp, sum, distance);
    }
    if (real && lane == 0) {
      if (p.dlse != nullptr) {
        sum -=
            static_cast<const A*>(p.dlse)[batch * p.dlse_batch_stride + head * p.dlse_head_stride + position * p.dlse_seq_stride];
      }
      static_cast<A*>(p.row_delta)[batch * p.lse_batch_stride + head * p.lse_head_stride + position] = sum;
    }
  }
}

}  // namespace fastlm::sliding_window_attention::cuda
