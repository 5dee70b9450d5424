// Memory in which the positions of a channel are adjacent: a thread has kSteps positions of one channel, moved by loads and
// stores of 16 bytes where these are aligned.
#pragma once

#include "ops/causal_conv1d/cuda/segments.cuh"
#include "ops/causal_conv1d/cuda/tiling.h"

namespace fastlm::causal_conv1d::cuda {

// Which positions of which channel a thread has. Blocks are numbered pieces of time fastest, then channels, then rows of the
// batch.
struct LinePlace {
  uint32_t piece;  // counted through the batch
  int64_t batch, channel, t0;
};
__device__ __forceinline__ LinePlace line_place(const Tiling& tiling) {
  const uint32_t per_line = tiling.threads_per_line;
  const uint32_t piece = blockIdx.x % tiling.pieces;
  const uint32_t rest = blockIdx.x / tiling.pieces;
  const uint32_t batch = rest / tiling.channel_blocks;
  const int64_t channel =
      static_cast<int64_t>(rest % tiling.channel_blocks) * (kChannelThreads / per_line) + threadIdx.x / per_line;
  const int64_t t0 = (static_cast<int64_t>(piece) * per_line + threadIdx.x % per_line) * kSteps;
  return {batch * tiling.pieces + piece, batch, channel, t0};
}

// kFirst values before, kSteps at, and kAfter behind the thread's positions.
template <class T, int kFirst, int kAfter>
__device__ __forceinline__ void load_line(const T* x, bool vectors, acc_t<T> (&v)[kFirst + kSteps + kAfter]) {
  constexpr int kVector = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kFirst; ++i) v[i] = to_acc(x[i - kFirst]);
  if (vectors) {
#pragma unroll
    for (int k = 0; k < kSteps; k += kVector) {
      Elements<T, kVector> raw;
      raw.load(x + k);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[kFirst + k + i] = raw.get(i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) v[kFirst + i] = to_acc(x[i]);
  }
#pragma unroll
  for (int i = 0; i < kAfter; ++i) v[kFirst + kSteps + i] = to_acc(x[kSteps + i]);
}

template <class T>
__device__ __forceinline__ void store_line(T* out, bool vectors, const acc_t<T> (&v)[kSteps]) {
  constexpr int kVector = 16 / sizeof(T);
  if (vectors) {
#pragma unroll
    for (int k = 0; k < kSteps; k += kVector) {
      acc_t<T> part[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) part[i] = v[k + i];
      Elements<T, kVector> raw;
      raw.set(part);
      raw.words.store_whole(out + k);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) out[i] = from_acc<T>(v[i]);
  }
}

}  // namespace fastlm::causal_conv1d::cuda
