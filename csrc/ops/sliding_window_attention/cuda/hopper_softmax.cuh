// Scores of a warpgroup in the registers of its products (see wgmma in hopper.cuh): rows g and g + 8 of the warp's sixteen, 2 of
// every 8 columns. Online softmax by base 2.
#pragma once

#include "core/cuda/hopper.cuh"
#include "ops/sliding_window_attention/cuda/hopper_params.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Columns [begin, end) of this thread's two rows count, relative to the block; all others become `other`.
template <int kColumns>
__device__ __forceinline__ void mask(float (&s)[kColumns / 2], const int (&begin)[2], const int (&end)[2], float other,
                                     int lane) {
  const int own = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = begin[i] - own, to = end[i] - own;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& x = s[4 * j + 2 * i + k];
        if (8 * j + k < from || 8 * j + k >= to) x = other;
      }
    }
  }
}

// Running softmax of two rows: largest score (in units of log 2, rounded once) and this thread's part of the sum of weights.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Raw scores become weights; what was summed before is to be multiplied by `factor`, exactly 1 where the maximum stays. A NaN
// score leaves the maximum alone and reaches the sum.
template <int kColumns>
__device__ __forceinline__ void softmax_step(float (&s)[kColumns / 2], RowState& rows, float (&factor)[2], float unit) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top0 = s[2 * i], top1 = s[2 * i + 1];
#pragma unroll
    for (int j = 1; j < kColumns / 8; ++j) {
      top0 = fmaxf(top0, s[4 * j + 2 * i]);
      top1 = fmaxf(top1, s[4 * j + 2 * i + 1]);
    }
    const float top = fmaxf(rows.top[i], quad_max(fmaxf(top0, top1)) * unit);
    const float shift = top == -INFINITY ? 0.0f : top;
    factor[i] = exp2_approx(rows.top[i] - shift);
    rows.top[i] = top;
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float& a = s[4 * j + 2 * i];
      float& b = s[4 * j + 2 * i + 1];
      a = exp2_approx(fmaf(a, unit, -shift));
      b = exp2_approx(fmaf(b, unit, -shift));
      sum0 += a;
      sum1 += b;
    }
    rows.sum[i] = fmaf(rows.sum[i], factor[i], sum0 + sum1);
  }
}

// Weights as the left operand of the next product: 16 columns for each step.
template <class T, int kColumns>
__device__ __forceinline__ void to_operand(const float (&s)[kColumns / 2], uint32_t (&a)[kColumns / 16][4]) {
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[j][i] = pack_pair<T>(s[8 * j + 2 * i], s[8 * j + 2 * i + 1]);
  }
}

// The four lanes of a quad hold one pair each of four groups of eight columns; afterwards lane c holds all of group c.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const uint32_t keep0 = odd ? x[1] : x[0], keep1 = odd ? x[3] : x[2];
  const uint32_t come0 = __shfl_xor_sync(kFullWarp, odd ? x[0] : x[1], 1);
  const uint32_t come1 = __shfl_xor_sync(kFullWarp, odd ? x[2] : x[3], 1);
  const uint32_t low0 = odd ? come0 : keep0, low1 = odd ? keep0 : come0;
  const uint32_t high0 = odd ? come1 : keep1, high1 = odd ? keep1 : come1;
  const uint32_t mine0 = high ? high0 : low0, mine1 = high ? high1 : low1;
  const uint32_t other0 = __shfl_xor_sync(kFullWarp, high ? low0 : high0, 2);
  const uint32_t other1 = __shfl_xor_sync(kFullWarp, high ? low1 : high1, 2);
  x[0] = high ? other0 : mine0;
  x[1] = high ? other1 : mine1;
  x[2] = high ? mine0 : other0;
  x[3] = high ? mine1 : other1;
}

// The sums of this thread's two rows times `factor` to memory, rounded once; 16 bytes for each lane. Columns from `width` on, a
// multiple of 8, are not there.
template <class T, int kColumns>
__device__ __forceinline__ void store_rows(const float (&o)[kColumns / 2], const float (&factor)[2], T* const (&row)[2],
                                           const bool (&real)[2], int64_t width, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 32; ++j) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = 4 * (4 * j + k) + 2 * i;
        x[k] = pack_pair<T>(o[at] * factor[i], o[at + 1] * factor[i]);
      }
      transpose_quad(x, lane);
      const int column = 32 * j + lane % 4 * 8;
      if (real[i] && column < width) *reinterpret_cast<uint4*>(row[i] + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

}  // namespace fastlm::sliding_window_attention::cuda
