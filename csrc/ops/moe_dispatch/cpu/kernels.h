// The CPU kernels of moe_dispatch: one table per CPU level, one entry per element type (index: DType). Every function does one
// piece of its phase; the pieces of a phase may run in any order and on any thread.
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/moe_dispatch/params.h"

namespace fastlm::moe_dispatch {

struct ForwardKernels {
  int64_t columns[4];   // N: columns of a tile
  int64_t elements[4];  // values per operand: 2 where bf16 is multiplied in pairs
  int64_t operand_bytes[4];
  void (*pack[4])(const Pack&, int64_t piece);        // pieces: (group, kBlock rows)
  void (*gate_up[4])(const GateUp&, int64_t piece);   // pieces: (group, kHalfBlock inner rows; kBlock without a gate)
  void (*product[4])(const Product&, int64_t piece);  // pieces: (group, kBlock rows of the weight)
  void (*combine[4])(const Combine&, int64_t begin, int64_t end);  // items: tokens
};

struct BackwardKernels {
  void (*gate[4])(const GateBackward&, int64_t piece);       // pieces: (group, kBlock inner columns)
  void (*row_product[4])(const RowProduct&, int64_t piece);  // pieces: (group, kBlock columns)
  void (*outer[4])(const Outer&, int64_t piece);             // pieces: (group, kBlock rows, kBlock columns)
  void (*bias[4])(const BiasGradient&, int64_t piece);       // pieces: (group, kBlock columns)
  void (*pick[4])(const PickGradient&, int64_t piece);       // pieces: groups
};

}  // namespace fastlm::moe_dispatch

FASTLM_DECLARE_CPU_KERNELS(moe_dispatch::ForwardKernels, moe_dispatch_forward)
FASTLM_DECLARE_CPU_KERNELS(moe_dispatch::BackwardKernels, moe_dispatch_backward)
