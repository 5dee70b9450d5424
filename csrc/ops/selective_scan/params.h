// What the kernels of selective_scan see: plain pointers and strides (in elements). Shared by the CPU and the CUDA twin.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::selective_scan {

constexpr int64_t kMaxState = 256;  // N
// The state is kept after every kChunk positions: what the backward pass starts from, and the tile of the CPU kernels.
constexpr int64_t kChunk = 64;

// A tensor (B, D, L) of the call's element type T.
struct Activation {
  void* data;  // null: not given
  int64_t batch_stride, dim_stride, seq_stride;
};

// B or C: per position (B, G', N, L) in T, or constant (D, N) in `dtype`. Each of its G' groups serves G / G' groups of channels.
struct Projection {
  const void* data;
  DType dtype;
  bool constant;
  int64_t groups;                                  // G'; 1 if constant
  int64_t batch_stride, group_stride, seq_stride;  // per position
  int64_t dim_stride;                              // constant
  int64_t state_stride;
};

// A parameter (D,) or (D, N).
struct Parameter {
  const void* data;  // null: not given
  DType dtype;
  int64_t dim_stride, state_stride;
};

// One row of the batch, or one packed sequence; its number is the row of initial_state and last_state.
struct Sequence {
  int64_t batch;
  int64_t begin, end;              // positions [begin, end)
  int64_t chunk_begin, chunk_end;  // its part of chunk_states, in chunks; may hold one more than the sequence fills
};

// Where sequences come from on a device, whose values the host does not know. Kernels clamp what they read.
struct DeviceSequences {
  const void* cu_seqlens;  // (S+1,) contiguous, or null: the rows of the batch
  bool cu_seqlens_64;      // int64 instead of int32
};

struct Params {
  int64_t batch, dim, seqlen, state;  // B, D, L, N
  int64_t groups;                     // G: least common multiple of the groups of B and C
  bool delta_softplus;

  Activation u, delta, z;
  Parameter A, D, delta_bias;
  Projection B, C;

  const void* initial_state;  // (S, D, N) or null
  DType initial_dtype;
  int64_t initial_batch_stride, initial_dim_stride, initial_state_stride;

  void* chunk_states;  // (B * (L / kChunk), N, D), accumulation type: state after positions kChunk, 2 kChunk, ... of a sequence

  const Sequence* sequences;  // CPU
  int64_t num_sequences;
  DeviceSequences device;  // CUDA
};

struct ForwardParams : Params {
  Activation out;
  void* last_state;  // (S, D, N), accumulation type, contiguous
  void* all_states;  // (B, L, D, N), accumulation type, contiguous, or null
};

struct BackwardParams : Params {
  Activation dout;
  const void* dlast_state;  // (S, D, N), accumulation type, contiguous, or null
  Activation du, ddelta, dz;
  void* dinitial_state;  // (S, D, N), accumulation type, contiguous, or null
};

struct UpdateParams {
  int64_t batch, dim, state;  // B, D, N
  bool dt_softplus;

  void* state_data;  // (slots, D, N) in `state_dtype`, updated in place
  DType state_dtype;
  int64_t state_batch_stride, state_dim_stride, state_state_stride;

  Activation x, dt, z, out;  // (B, D): seq_stride unused
  Parameter A, D, dt_bias;
  Projection B, C;  // (B, G', N): seq_stride unused

  const int64_t* state_batch_indices;  // (B,) or null; negative: padding row
};

}  // namespace fastlm::selective_scan
