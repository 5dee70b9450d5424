// linear_nll and its backward pass on CUDA: what the launches take, and how much memory. Torch-free. Letters: T tokens, h hidden
// size, V vocabulary; "acc" is the accumulation type.
//
// Both passes work on waves of tokens that count: their numbers are compacted on the device (`positions`, `count`), and a wave's
// hidden states are gathered, so that nothing is computed for other tokens. The host loops over as many waves as there can be;
// launches for those that are not there find no rows.
#pragma once

#include <cuda_runtime_api.h>

#include "core/cuda/gemm/problem.h"

namespace fastlm::slm_loss::cuda {

#ifdef FASTLM_EMULATE_CUDA  // so that small tests see several waves and panels
constexpr int64_t kMostRows = 256, kMostWords = 512;
#else
constexpr int64_t kMostRows = 8192, kMostWords = 8192;
#endif

// The head, and the tokens that take part.
struct Head {
  int64_t tokens, hidden_size, vocab;
  const void* hidden;  // (T, h)
  int64_t hidden_row_stride, hidden_col_stride;
  const void* weight;  // (V, h), rows are contiguous
  int64_t weight_row_stride;
  const void* bias;    // (V,) acc or null
  double softcap;      // 0: none
  const void* labels;  // (T,) int32, or int64 if labels_64; what is ignore_index or outside of [0, V) does not count
  bool labels_64;
  int64_t ignore_index;
};

// Per token, (T,) acc or null.
struct TokenGradients {
  const void* dnll;
  const void* dlse;
  const void* dentropy;
  const void* lse;
  const void* entropy;  // read only with dentropy
};

// Which tokens take part, as launch_compact leaves them.
struct Chosen {
  int32_t* positions;
  int32_t* count;
};

// The memory of one wave: gathered hidden states, labels, and what a pass keeps beside them.
struct Wave {
  int64_t rows;    // the most there can be
  int64_t stride;  // of `hidden`, elements
  void* hidden;    // (rows, stride)
  int32_t* label;  // (rows,)
};

struct ForwardPlan {
  int64_t rows, stride;  // of a wave
  fastlm::cuda::gemm::Backend backend;
  int64_t slabs;  // of the vocabulary
};
ForwardPlan plan_forward(const Head& head, DType dtype, bool entropy);

struct ForwardCall {
  Head head;
  ForwardPlan plan;
  Chosen chosen;
  Wave wave;
  // (slabs, rows) acc: per token the maximum z over a slab of words, the sum of e^(z - maximum) and, wanted for the entropy only,
  // of (z - maximum) e^(z - maximum)
  void* slab_max;
  void* slab_sum;
  void* slab_weighted;
  void* label_logit;  // (rows,) acc
  void* nll;          // (T,) acc; zero where tokens do not count, like the other two
  void* lse;
  void* entropy;  // or null
};
cudaError_t launch_forward(const ForwardCall& call, DType dtype, cudaStream_t stream);

struct BackwardPlan {
  int64_t most_rows;     // of a wave: the same for every T, so that sums are cut in the same places
  int64_t rows, stride;  // of this call's waves
  int64_t words;         // of a panel of the vocabulary
};
BackwardPlan plan_backward(const Head& head, DType dtype);

// Values of a token in `row_values`, each (rows,) acc.
enum RowValue : int { kLse, kShared, kDnll, kDentropy, kEntropy, kRowValues };

struct BackwardCall {
  Head head;
  TokenGradients gradients;
  BackwardPlan plan;
  Chosen chosen;
  Wave wave;
  void* row_values;   // (kRowValues, rows) acc
  void* dlogits;      // (rows, words)
  void* dhidden_sum;  // (rows, h) acc
  void* bias_slabs;   // (ceil(rows / 16), words) acc: sums over the rows of a slab
  float* scale;       // two floats: what float16 gradients of logits are multiplied by, and one over it; null for other types

  void* dhidden;      // (T, h) contiguous and zero, or null
  void* dweight;      // (V, h) contiguous, or null where there are several waves
  void* dweight_sum;  // (V, h) acc, or null
  void* dbias;        // (V,) acc, or null
};
cudaError_t launch_backward(const BackwardCall& call, DType dtype, cudaStream_t stream);

// Parts of these, compiled apart.
template <class T>
cudaError_t run_forward(const ForwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t run_backward(const BackwardCall& call, cudaStream_t stream);

// The tokens [first, first + rows) of those chosen, into wave.hidden and wave.label; row_values with gradients.
cudaError_t launch_gather(const Head& head, const TokenGradients* gradients, const Chosen& chosen, const Wave& wave,
                          int64_t first, void* row_values, const float* scale, DType dtype, cudaStream_t stream);
// The largest power of two that keeps gradients of logits in the range of float16, from those of the tokens.
cudaError_t launch_scale(const Head& head, const TokenGradients& gradients, float* scale, cudaStream_t stream);
cudaError_t launch_finish(const ForwardCall& call, int64_t first, DType dtype, cudaStream_t stream);
// dhidden of a wave's tokens from dhidden_sum.
cudaError_t launch_scatter(const BackwardCall& call, int64_t first, DType dtype, cudaStream_t stream);
// dbias of a panel from bias_slabs, added to what earlier waves left there.
cudaError_t launch_dbias(const BackwardCall& call, int64_t first, int64_t word, int64_t words, DType dtype, cudaStream_t stream);

}  // namespace fastlm::slm_loss::cuda
