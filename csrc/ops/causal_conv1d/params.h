// What the kernels of causal_conv1d see: plain pointers and strides (in elements). Shared by the CPU and the CUDA twin.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::causal_conv1d {

// Filters wider than this are refused: it bounds the arrays of row pointers in the kernels.
constexpr int64_t kMaxWidth = 32;

// A run of positions of one row that the filter may not look out of.
struct Segment {
  int64_t batch;        // row of x
  int64_t begin, end;   // positions [begin, end)
  int64_t initial;      // row of initial_states, or -1: zeros
  int64_t final_state;  // row of final_states this segment fills, or -1
  int64_t padding;      // 1: seq_idx is negative, the output is 0
};

// Where segments come from on a device, whose values the host does not know. The kernels clamp what they read, so that wrong
// values give wrong numbers but never an access out of bounds.
struct DeviceSegments {
  const void* cu_seqlens;  // (S+1,) contiguous or null
  const void* seq_idx;     // (B, L) or null
  int64_t num_sequences;   // S
  int64_t seq_idx_batch_stride, seq_idx_seq_stride;
  bool cu_seqlens_64, seq_idx_64;  // int64 instead of int32
};

struct Params {
  int64_t batch, dim, seqlen, width;
  bool silu;

  const void* x;  // (B, D, L), element type T
  int64_t x_batch_stride, x_dim_stride, x_seq_stride;
  void* out;  // (B, D, L), T, same layout as x
  int64_t out_batch_stride, out_dim_stride, out_seq_stride;

  const void* weight;  // (D, W)
  DType weight_dtype;
  int64_t weight_dim_stride, weight_width_stride;
  const void* bias;  // (D,) or null
  DType bias_dtype;
  int64_t bias_stride;

  const void* initial_states;  // (S, D, W-1), T, or null
  int64_t initial_batch_stride, initial_dim_stride, initial_width_stride;
  void* final_states;  // (S, D, W-1), T, contiguous

  const Segment* segments;  // CPU
  int64_t num_segments;
  DeviceSegments device;  // CUDA
};

struct BackwardParams : Params {  // `out` and `final_states` are unused here
  const void* dout;               // (B, D, L), T, same layout as x
  int64_t dout_batch_stride, dout_dim_stride, dout_seq_stride;
  const void* dfinal_states;  // (S, D, W-1), T, contiguous, or null
  void* dx;                   // (B, D, L), T, same layout as x
  int64_t dx_batch_stride, dx_dim_stride, dx_seq_stride;
  void* dinitial_states;  // (S, D, W-1), T, contiguous, or null
  void* partial;  // (P, W + 1, D) in the accumulation type: weight and bias gradients of each piece of work, summed in order
};

// The index vectors of a decoding step on a device, as they came. Any value is safe: a slot that does not exist is a padding row,
// and the ring takes positions modulo its size.
struct DeviceRows {
  const void* cache_seqlens;       // (B,) or null
  const void* conv_state_indices;  // (B,) or null
  int64_t cache_seqlens_stride, conv_state_indices_stride;
  bool cache_seqlens_64, conv_state_indices_64;  // int64 instead of int32
};

struct UpdateParams {
  int64_t batch, dim, num_tokens, width, state_len;
  bool silu;

  const void* x;  // (B, D, m), T
  int64_t x_batch_stride, x_dim_stride, x_seq_stride;
  void* out;  // (B, D, m), T
  int64_t out_batch_stride, out_dim_stride, out_seq_stride;

  void* conv_state;  // (slots, D, S), T
  int64_t state_batch_stride, state_dim_stride, state_len_stride;

  const void* weight;  // (D, W)
  DType weight_dtype;
  int64_t weight_dim_stride, weight_width_stride;
  const void* bias;  // (D,) or null
  DType bias_dtype;
  int64_t bias_stride;

  const int64_t* cache_seqlens;       // (B,) or null: shift instead of ring (CPU)
  const int64_t* conv_state_indices;  // (B,) or null; negative: padding row (CPU)
  int64_t num_slots;                  // rows of conv_state
  DeviceRows device;                  // CUDA
};

}  // namespace fastlm::causal_conv1d
