// What the CUDA kernels of samba_decode_step see. One token per row of the batch ("tokens" below), so every product is a matrix
// times a few vectors: the weights are streamed once. Plain pointers and strides in elements; T: element type of weights and
// activations; acc: float, or double for double.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/integers.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::samba_decode_step::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPieces = 2;                 // of 16 bytes: what a thread takes of a chunk
constexpr int kStages = 4;                 // chunks of which a thread has its pieces under way
constexpr int kTileRows = 8;               // rows of a weight that a block multiplies at once
constexpr int64_t kMaxStaged = 64 * 1024;  // bytes of normalised tokens in shared memory, at most

// Tokens multiplied at once: with 16-bit elements by the matrix instruction, else one by one.
constexpr int max_tokens(int64_t element_bytes) { return element_bytes == 2 ? 16 : 4; }
// Columns that the four lanes of a row take at once.
constexpr int chunk_columns(int64_t element_bytes) { return static_cast<int>(4 * kPieces * 16 / element_bytes); }

// What becomes of a product.
enum class Use : int32_t {
  kStore,    // y = x W^T in T
  kPartial,  // sums over a split of the columns, in acc: (splits, B, rows)
  kAdd,      // y = base + x W^T in acc
  kGate,     // y = silu(x W0^T) * (x W1^T) in T; tiles take 4 rows of each
  kConv,     // rows below conv.dim go through the convolution into y, the others are stored behind them in z
};

struct Weight {
  const void* data;  // (rows, columns) T, unit stride over columns
  int64_t stride, rows;
  void* y;
  int64_t y_stride;
  bool vector;  // rows may be read 16 bytes at a time
  int first_tile;
};

struct Product {
  int64_t columns;
  int batch;
  Use use;
  int num_weights;
  Weight weights[3];
  int row_tiles, splits;     // tiles of kTileRows rows; splits of the columns
  int chunks, split_chunks;  // chunks of chunk_columns columns; chunks of a split
  const void* x;             // (B, columns) T
  int64_t x_stride;
  bool x_vector;
  int group;  // tokens a block takes at once
  // Or, where `hidden` is not null, x is hidden (B, columns) acc, contiguous, normalised.
  const void* hidden;
  const void* norm;  // (columns,)
  DType norm_dtype;
  int64_t norm_stride;
  double eps;
  int staged_stride;  // elements between tokens in shared memory
  const void* base;   // kAdd: like y
  void* z;            // kConv
  int64_t z_stride;
  int32_t* zeroed;  // counters to be set to 0 for the phases behind this one
  int num_zeroed;
};

// The state of D channels by one position: decay, state update, gate. Its steps come from a product of their own, weight (D, R),
// whose `x` is formed from the partial sums below.
struct StateUpdate {
  const void* low;  // (splits, B, R + 2 N) acc: dt's input, B, C
  int splits;
  int state;          // N
  const void *u, *z;  // (B, D) T
  int64_t u_stride, z_stride;
  void* y;  // (B, D) T
  int64_t y_stride;
  const void *A_log, *D, *bias;
  DType A_dtype, D_dtype, bias_dtype;
  int64_t A_dim_stride, A_state_stride, D_stride, bias_stride;
  void* h;  // (B, D, N)
  DType h_dtype;
  int64_t h_batch_stride, h_dim_stride, h_state_stride;
  int low_stride;  // elements of T between tokens in shared memory
};

// Bytes of shared memory, by part: pieces under way, what phases keep there.
constexpr int kStageBytes = kStages * kPieces * kThreads * 16;
constexpr int kSumBytes = 2 * kWarps * 16 * kTileRows * 4;  // sums of the warps, twice
constexpr int kNormBytes = kWarps * 16 * 8;

inline int product_shared_bytes(const Product& p, int64_t element_bytes) {
  const int64_t staged = p.hidden == nullptr ? 0 : int64_t{p.group} * p.staged_stride * element_bytes;
  return static_cast<int>(kStageBytes + kSumBytes + kNormBytes + staged);
}
inline int state_shared_bytes(const Product& dt, const StateUpdate& p, int64_t element_bytes) {
  const int64_t acc = element_bytes == 8 ? 8 : 4;
  return static_cast<int>(kStageBytes + kSumBytes + dt.group * (p.low_stride * element_bytes + 2 * p.state * acc));
}

}  // namespace fastlm::samba_decode_step::cuda
