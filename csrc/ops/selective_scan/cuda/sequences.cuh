// Sequences on the device: rows of the batch, or packed ones, whose bounds are clamped so that wrong values give wrong numbers
// but never an access out of bounds.
#pragma once

#include "core/cuda/device.cuh"
#include "ops/selective_scan/cuda/forward_call.h"

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

// A stretch of a sequence; `number` of the sequence, or -1 where a slot is empty.
struct Part {
  Sequence sequence;
  int64_t number, begin, end;
};

// Slot of a sequence's first part, and the parts it has (one if it is empty).
__device__ inline int64_t first_slot(const Params& p, const Split& split, int64_t s, const Sequence& sequence) {
  if (split.part == 0) return s;
  return p.device.cu_seqlens != nullptr ? sequence.begin / split.part + s : s * max_of(1, ceil_div(p.seqlen, split.part));
}
__device__ inline int64_t num_parts(const Split& split, const Sequence& sequence) {
  return split.part == 0 ? 1 : max_of(1, ceil_div(sequence.end - sequence.begin, split.part));
}

__device__ inline Part part_of(const Params& p, const Split& split, int64_t slot) {
  int64_t low = 0, high = p.num_sequences;  // the last sequence whose first slot is at or before this one
  if (split.part == 0) {
    low = slot;
  } else {
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_slot(p, split, middle, sequence_of(p, middle)) <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
  }
  const Sequence sequence = sequence_of(p, low);
  const int64_t part = slot - first_slot(p, split, low, sequence);
  if (part < 0 || part >= num_parts(split, sequence)) return {sequence, -1, 0, 0};
  const int64_t begin = sequence.begin + part * split.part;
  const int64_t end = split.part == 0 ? sequence.end : min_of(begin + split.part, sequence.end);
  return {sequence, low, begin, end};
}

}  // namespace fastlm::selective_scan::cuda
