// What the kernels of slm_loss see: plain pointers and strides (in elements). Letters: T tokens, n tokens that count ("rows"), h
// hidden size, V vocabulary. The work is cut into panels of the vocabulary and groups of rows; a panel of the weight and a group
// of the hidden states lie packed in scratch memory, so that logits exist for one block at a time. All cuts are fixed: no result
// depends on the number of threads.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::slm_loss {

// A piece of work: kRowBlock rows x kColumnBlock columns of logits or of a gradient. Both are multiples of every level's tile.
constexpr int64_t kRowBlock = 96;
constexpr int64_t kColumnBlock = 192;

// The problem, and what both passes keep packed. "acc" is the accumulation type: float, or double for double.
struct Params {
  int64_t hidden_size, vocab;
  int64_t num_rows;       // n
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

  int64_t group_size;  // rows of a group, multiple of kRowBlock
  int64_t panel_size;  // columns of a panel, multiple of kColumnBlock
  // Packed for core/simd/packed_gemm.h; words and N are the level's.
  void* hidden_rows;     // group, rows of A
  void* hidden_columns;  // group, columns of B over h, k = rows; floats: the same memory
  void* weight_columns;  // panel, columns of B over V, k = h
  void* weight_rows;     // panel, columns of B over h, k = V; null when no gradient of hidden is wanted
  void* bias_packed;     // (panel_size,) acc
};

// One step: a group of rows [row_begin, row_end) and a panel [vocab_begin, vocab_end).
struct Step {
  int64_t row_begin, row_end;
  int64_t vocab_begin, vocab_end;
};

struct ForwardParams : Params {
  // (panel_size / kColumnBlock, group_size) acc: maximum, sum of exponentials, and sum of (z - maximum) times them, of one block
  void* block_max;
  void* block_sum;
  void* block_weighted;
  // (n,) acc: the same over all panels so far, and the label's logit
  void* row_max;
  void* row_sum;
  void* row_weighted;
  void* row_label;

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

  void* dlogits_rows;        // panel x group: rows of A, k = V
  void* dlogits_transposed;  // panel x group: transposed A, k = rows; floats: the same memory
  void* dhidden_sum;         // (n rounded up to kRowBlock, padded_hidden) acc, or null
  void* dweight_sum;         // (panel_size, padded_hidden) acc, or null
  int64_t padded_hidden;     // h rounded up to whole tiles
  void* dbias_sum;           // (blocks of rows of a group + 1, panel_size) acc, the last row being the total; or null

  void* dhidden;  // (T, h) contiguous, or null
  void* dweight;  // (V, h) contiguous, or null
  void* dbias;    // (V,) in bias_dtype, or null
};

}  // namespace fastlm::slm_loss
