// Sequences on the device: rows of the batch, or packed ones, whose bounds are clamped so that wrong values give wrong numbers
// but never an access out of bounds.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan::cuda {

__device__ inline Sequence sequence_of(const Params& p, int64_t s) {
  const int64_t chunks = p.seqlen / kChunk;  // of a row
  if (p.device.cu_seqlens == nullptr) return {s, 0, p.seqlen, s * chunks, (s + 1) * chunks};
  const auto clamped = [&](int64_t i, int64_t low) {
    const int64_t x = fastlm::cuda::load_index(p.device.cu_seqlens, p.device.cu_seqlens_64, i);
    return x < low ? low : x > p.seqlen ? p.seqlen : x;
  };
  const int64_t begin = clamped(s, 0), end = clamped(s + 1, begin);
  return {0, begin, end, begin / kChunk, end / kChunk};
}

}  // namespace fastlm::selective_scan::cuda
