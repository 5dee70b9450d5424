// What the kernels of slm_loss see: plain pointers and strides (in elements). Letters: T tokens, n tokens that count, h hidden
// size, V vocabulary. Hidden states and a panel of the weight lie packed in scratch memory, and logits exist for one block at a
// time: one row per word, one lane per token, so that nothing is ever summed across lanes and weights are packed as they lie.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::slm_loss {

// Multiples of every level's tile. Logits: words x tokens of one block. Gradients of hidden states and of the weight: rows
// (tokens or words) x columns (of h) of one product.
constexpr int64_t kWordBlock = 192;
constexpr int64_t kTokenBlock = 96;
constexpr int64_t kRowBlock = 96;
constexpr int64_t kColumnBlock = 192;

// The problem, and what both passes keep packed. "acc" is the accumulation type: float, or double for double.
struct Params {
  int64_t hidden_size, vocab;
  int64_t num_tokens;        // n; of the chunk in the forward pass
  const int64_t* positions;  // (n,) in [0, T), ascending
  const int64_t* labels;     // (n,) in [0, V)

  const void* hidden;  // (T, h)
  int64_t hidden_row_stride, hidden_col_stride;
  const void* weight;  // (V, h)
  int64_t weight_row_stride, weight_col_stride;
  const void* bias;  // (V,) or null
  DType bias_dtype;
  int64_t bias_stride;
  double softcap;  // 0: none
  bool entropy;    // forward: wanted; backward: its gradient is not null

  // Packed hidden states, see core/simd/packed_gemm.h; capacity: n rounded up to kTokenBlock.
  int64_t capacity;
  void* hidden_columns;  // columns of B over n, k = h
  void* hidden_depths;   // columns of B over h, k = n; null when no gradient of weight is wanted
};

struct ForwardParams : Params {
  // (V / kWordBlock rounded up, capacity) acc: per token the maximum over one block of words, the sum of e^(z - maximum), and the
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
  void* per_token;         // (5, capacity) acc: the above gathered; tokens beyond n are such that their gradient is 0

  int64_t padded_hidden;  // h rounded up to whole tiles
  void* dhidden_sum;      // (capacity, padded_hidden) acc
  void* dhidden;          // (T, h) contiguous, or null
  void* dweight;          // (V, h) contiguous, or null
  void* dbias;            // (V,) in bias_dtype, or null
};

// Words [begin, end) of the vocabulary and the buffers they use while they are worked on.
struct Panel {
  int64_t begin, end;
  int64_t size;              // capacity in words, a multiple of kWordBlock
  void* weight_rows;         // rows of A over V, k = h
  void* bias;                // (size,) acc
  void* weight_depths;       // columns of B over h, k = V; floats: the same memory as weight_rows
  void* dlogits_rows;        // rows of A over V, k = n
  void* dlogits_transposed;  // transposed A over n, k = V; floats: the same memory as dlogits_rows
  void* dbias_blocks;        // (capacity / kTokenBlock, size) acc: sums over one block of tokens
};

}  // namespace fastlm::slm_loss
