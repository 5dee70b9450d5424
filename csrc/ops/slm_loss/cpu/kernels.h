// The CPU kernels of slm_loss: one table per CPU level, one entry per element type (index: DType). Every function takes a range
// of pieces of work; pieces of one call may run in any order and on any thread.
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/slm_loss/params.h"

namespace fastlm::slm_loss {

using Pack = void (*)(const Params&, const Step&, int64_t begin, int64_t end);
using Forward = void (*)(const ForwardParams&, const Step&, int64_t begin, int64_t end);
using Backward = void (*)(const BackwardParams&, const Step&, int64_t begin, int64_t end);

struct PackKernels {
  int64_t columns[4];   // N: columns of a tile
  int64_t elements[4];  // elements per word: 2 where bf16 is multiplied in pairs, and then A and transposed A differ
  Pack hidden[4];       // pieces: blocks of kRowBlock rows of the group
  Pack weight[4];       // pieces: blocks of kRowBlock rows of the weight in the panel
};

struct ForwardKernels {
  Forward logits[4];  // pieces: (block of rows, block of columns): row_label and block_* of this block
  Forward merge[4];   // pieces: blocks of rows: block_* into row_*
  Forward finish[4];  // pieces: blocks of all rows: nll, lse, entropy
};

struct BackwardKernels {
  Backward dlogits[4];        // pieces: (block of rows, block of columns)
  Backward dhidden[4];        // pieces: (block of rows, block of columns of h): adds into dhidden_sum
  Backward dweight[4];        // pieces: (block of kRowBlock rows of the panel, block of columns of h): adds into dweight_sum
  Backward dbias[4];          // pieces: blocks of columns: adds the group's sums into the total
  Backward write_dhidden[4];  // pieces: blocks of all rows
  Backward write_dweight[4];  // pieces: blocks of kRowBlock rows of the panel; dbias too
};

}  // namespace fastlm::slm_loss

FASTLM_DECLARE_CPU_KERNELS(slm_loss::PackKernels, slm_loss_pack)
FASTLM_DECLARE_CPU_KERNELS(slm_loss::ForwardKernels, slm_loss_forward)
FASTLM_DECLARE_CPU_KERNELS(slm_loss::BackwardKernels, slm_loss_backward)
