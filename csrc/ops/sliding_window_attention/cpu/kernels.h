// The CPU kernels of sliding_window_attention: one table per CPU level, one entry per element type (index: DType).
#pragma once

#include "core/cpu_dispatch.h"
#include "core/integers.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention {

// Queries [begin, end) of one sequence, all heads that share one key head.
struct QueryBlock {
  int64_t sequence, kv_head, begin, end;
};

// Rows (queries x heads of a group) one block aims at: what is packed of K and V serves that many rows; together with their sums
// the rows stay within half of a 512 KiB cache. Any number gives the same bits.
static constexpr int64_t query_block_rows(int64_t head_dim) { return max_of(24, min_of(192, 24576 / head_dim / 24 * 24)); }

using Forward = void (*)(const Params&, const QueryBlock* blocks, int64_t begin, int64_t end);

struct ForwardKernels {
  Forward forward[4];
};

}  // namespace fastlm::sliding_window_attention

FASTLM_DECLARE_CPU_KERNELS(sliding_window_attention::ForwardKernels, sliding_window_attention_forward)
