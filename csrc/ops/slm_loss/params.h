// What the kernels of slm_loss see: plain pointers and strides (in elements). Letters: T tokens, n tokens that count ("rows"), h
// hidden size, V vocabulary. Hidden states and a panel of the weight lie packed in scratch memory, and logits exist for one block
// at a time.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::slm_loss {

// Rows x columns of one product. Both are multiples of every level's tile.
constexpr int64_t kRowBlock = 96;
constexpr int64_t kColumnBlock = 192;

// The problem, and what both passes keep packed. "acc" is the accumulation type: float, or double for double.
struct Params {
  int64_t hidden_size, vocab;
  int64_t num_rows;       // n; of the chunk in the forward pass
  const int64_t* rows;    // (n,) positions in [0, T), ascending
  const int64_t* labels;  // (n,) in [0, V)

  const void* hidden;  // (T, h)
  int64_t hidden_row_stride, hidden_col_stride;
  const void* weight;  // (V, h)
  int64_t weight_row_stride, weight_col_stride;
  const void* bias;  // (V,) or null
  DType bias_dtype;
  int64_t bias_stride;
  double softcap;  // 0: none
  bool entropy;    // forward: wanted; backward: its gradient is not null

  // Packed hidden states, see core/simd/packed_gemm.h; capacity: n rounded up to kRowBlock.
  int64_t capacity;
  void* hidden_rows;     // rows of A
  void* hidden_columns;  // columns of B over h, k = rows; floats: the same memory; null when no gradient of weight is wanted
};

struct ForwardParams : Params {
  // (V / kColumnBlock rounded up, capacity) acc: per row the maximum of one block of columns, the sum of e^(z - maximum), and the
  // sum of (z - maximum) e^(z - maximum), the latter null without entropy
  void* block_max;
  void* block_sum;
  void* block_weighted;
  void* label_logit;  // (n,) acc

  void* nll;          // (T,) acc
  void* lse;          // (T,) acc
  void* entropy_out;  // (T,) acc or null
};

struct BackwardParams : Params {
  const void* dnll;        // (T,) acc or null
  const void* dlse;        // (T,) acc or null
  const void* dentropy;    // (T,) acc or null
  const void* lse;         // (T,) acc
  const void* entropy_in;  // (T,) acc or null

  int64_t padded_hidden;  // h rounded up to whole tiles
  void* dhidden_sum;      // (capacity, padded_hidden) acc
  void* dhidden;          // (T, h) contiguous, or null
  void* dweight;          // (V, h) contiguous, or null
  void* dbias;            // (V,) in bias_dtype, or null
};

// Columns [begin, end) of the vocabulary and the buffers they use while they are worked on.
struct Panel {
  int64_t begin, end;
  int64_t size;              // capacity in columns
  void* weight_columns;      // columns of B over V, k = h
  void* bias;                // (size,) acc
  void* weight_rows;         // columns of B over h, k = V
  void* dlogits_rows;        // rows of A, k = V
  void* dlogits_transposed;  // transposed A, k = rows; floats: the same memory
  void* dbias_blocks;        // (capacity / kRowBlock, size) acc: sums over one block of rows
};

}  // namespace fastlm::slm_loss
