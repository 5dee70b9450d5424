// What the sm_90a kernels are told beside the parameters of the call.
#pragma once

#include "core/cuda/tensor_map.h"
#include "ops/sliding_window_attention/cuda/scoring.cuh"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention::cuda {

using namespace fastlm::cuda;

// Tiles of rows of one head, in an order that keeps the other side in the second-level cache: heads in sections, within a section
// from the last rows to the first, heads innermost.
struct TileOrder {
  int64_t slots;    // tiles of one head (of one row of the batch; of all packed sequences)
  int64_t heads;    // heads times rows of the batch
  int64_t section;  // heads of a section
  int64_t count;    // slots * heads
};

struct HopperForward {
  Params p;
  Scoring<float> score;
  TensorMap q, k, v;
  TileOrder order;
};

// A tile of keys adds its part of dq to a workspace: fp32 blocks of queries in the order of the products' registers, one block
// for each head and slot of queries.
struct HopperBackward {
  BackwardParams p;
  Scoring<float> score;
  TensorMap q, k, v, dout;
  TileOrder keys, queries;
  float* dq_sum;  // (queries.heads, queries.slots, block)
  int* turns;     // (queries.heads, queries.slots) tiles of keys that have added their part
  int* ticket;    // next tile of keys
  int* ordered;   // 0 where bounds of packed sequences decrease: then nobody waits for a turn, and results mean nothing
};

}  // namespace fastlm::sliding_window_attention::cuda
