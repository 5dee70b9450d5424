// The CPU kernels of slm_loss: one table per CPU level, one entry per element type (index: DType). Every function does one piece
// of its phase; the pieces of a phase may run in any order and on any thread.
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/slm_loss/params.h"

namespace fastlm::slm_loss {

using Pack = void (*)(const Params&, int64_t piece);
using PackPanel = void (*)(const Params&, const Panel&, int64_t piece);
using Forward = void (*)(const ForwardParams&, int64_t piece);
using Backward = void (*)(const BackwardParams&, const Panel&, int64_t piece);

struct PackKernels {
  int64_t columns[4];          // N: columns of a tile
  int64_t elements[4];         // values per operand: 2 where bf16 is multiplied in pairs, and then A and transposed A differ
  int64_t depth[4];            // words of the narrowest panel; panels are multiples of it
  Pack hidden[4];              // pieces: blocks of tokens
  PackPanel weight_rows[4];    // pieces: blocks of kRowBlock words of the panel; with the bias
  PackPanel weight_depths[4];  // the same
};

struct ForwardKernels {
  Forward logits[4];  // pieces: blocks of words: block_* and label_logit for all tokens
  Forward finish[4];  // pieces: blocks of tokens: nll, lse, entropy
};

struct BackwardKernels {
  void (*tokens[4])(const BackwardParams&, int64_t piece);  // pieces: blocks of tokens: per_token
  Backward dlogits[4];                                      // pieces: (block of tokens, block of words)
  Backward dhidden[4];  // pieces: (kRowBlock tokens, block of columns of h): adds into dhidden_sum, after the last panel writes
                        // dhidden
  Backward dweight[4];  // pieces: (kRowBlock words of the panel, block of columns of h): writes dweight
  Backward dbias[4];    // pieces: blocks of words: writes dbias
};

}  // namespace fastlm::slm_loss

FASTLM_DECLARE_CPU_KERNELS(slm_loss::PackKernels, slm_loss_pack)
FASTLM_DECLARE_CPU_KERNELS(slm_loss::ForwardKernels, slm_loss_forward)
FASTLM_DECLARE_CPU_KERNELS(slm_loss::BackwardKernels, slm_loss_backward)
