// The CPU kernels of sliding_window_attention: one table per CPU level, one entry per element type (index: DType).
#pragma once

#include "core/cpu_dispatch.h"
#include "core/integers.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention {

// Queries [begin, end) of one sequence, all heads that share one key head. A row is one query of one of these heads.
struct QueryBlock {
  int64_t sequence, kv_head, begin, end;
};

// Rows a block of the forward pass aims at: what is packed of K and V serves that many; with their sums they fill half of a 512
// KiB cache. Any number gives the same bits.
static constexpr int64_t query_block_rows(int64_t head_dim) { return max_of(24, min_of(192, 24576 / head_dim / 24 * 24)); }

// Items: blocks.
using ForwardKernel = void (*)(const Params&, const QueryBlock* blocks, int64_t begin, int64_t end);

struct ForwardKernels {
  ForwardKernel forward[4];
};

// ---- backward -----------------------------------------------------------------------------------------------------
// The keys of a sequence are cut into chunks; a chunk owns its dk and dv. Its share of dq goes to one of `num_partials` buffers,
// chunk c to buffer c mod num_partials: more buffers than chunks that one block of queries can see. They are added in the order
// of chunks. All of this depends on shapes and windows alone, never on the number of threads.

constexpr int64_t kKeyBlock = 96;          // keys that are worked on at a time; chunks begin at multiples of it
constexpr int64_t kBackwardRows = 96;      // rows a block of queries aims at
constexpr int64_t kPartialAlign = 16;      // elements: row length of partial dq, a multiple of every vector
constexpr int64_t kPartialRowsAlign = 12;  // rows of a block in partial dq, a multiple of every tile

// Keys of a chunk where a query sees at most `span` keys: a little more than a window, so that a block of queries sees two
// chunks; a third of a long window, so that there are at most five buffers.
static constexpr int64_t keys_per_chunk(int64_t span, int64_t queries_per_block) {
  const int64_t keys = max_of(ceil_div(span, 3), min_of(span + queries_per_block, 12 * kKeyBlock));
  return max_of(ceil_div(keys, kKeyBlock), 1) * kKeyBlock;
}

// Keys [begin, end) of one sequence and one key head.
struct KeyChunk {
  int64_t sequence, kv_head, begin, end;
  int64_t partial;  // buffer of dq
};

// Where blocks of queries lie in the buffers of partial dq: (buffer, key head, block, row, K), rows and K padded.
struct PartialLayout {
  void* ptr;  // accumulation type
  int64_t num_partials;
  int64_t num_blocks;  // of all sequences, per key head
  int64_t queries_per_block;
  int64_t rows, columns;       // of one block, padded
  const int64_t* first_block;  // per sequence
  const int64_t* chunk_keys;   // per sequence: keys of a chunk
};

// Items: blocks of queries; fills row_delta.
using RowDelta = void (*)(const BackwardParams&, const QueryBlock* blocks, int64_t begin, int64_t end);
// Items: chunks; fills dk, dv and each chunk's share of dq.
using BackwardChunks = void (*)(const BackwardParams&, const PartialLayout&, const KeyChunk* chunks, int64_t begin, int64_t end);
// Items: blocks of queries; adds up dq.
using ReduceQueries = void (*)(const BackwardParams&, const PartialLayout&, const QueryBlock* blocks, int64_t begin, int64_t end);

struct BackwardKernels {
  RowDelta row_delta[4];
  BackwardChunks chunks[4];
  ReduceQueries reduce[4];
};

// ---- decoding -----------------------------------------------------------------------------------------------------
// Positions are cut at multiples of kSplit; every piece of a row's window gives a maximum, a sum and a weighted sum of values per
// query, which are put together in order. So there is parallel work even for one row, and the same bits for every number of
// threads.

constexpr int64_t kSplit = 256;
constexpr int64_t kQueryAlign = 16;  // elements: row length of prepared queries and of partial sums, a multiple of every vector

// Pieces that a window of `keys` positions may touch.
static constexpr int64_t num_splits(int64_t keys) { return keys <= 1 ? 1 : (keys - 2) / kSplit + 2; }

// Working memory of one call, accumulation type.
struct UpdateWorkspace {
  void* queries;    // (B, m, H, columns) turned and scaled, the padding zero
  void* sums;       // (B, Hkv, splits, m * H / Hkv, columns)
  void* weights;    // (B, Hkv, splits, m * H / Hkv, 2): largest score, sum of weights
  int64_t columns;  // K, padded
  int64_t splits;
};

// Items: (row, token): writes the caches, prepares the queries.
// Items: (row, key head, split): partial sums.
// Items: (row, key head): puts them together.
using UpdatePhase = void (*)(const UpdateParams&, const UpdateWorkspace&, int64_t begin, int64_t end);

struct UpdateKernels {
  UpdatePhase write[4];
  UpdatePhase attend[4];
  UpdatePhase merge[4];
};

}  // namespace fastlm::sliding_window_attention

FASTLM_DECLARE_CPU_KERNELS(sliding_window_attention::ForwardKernels, sliding_window_attention_forward)
FASTLM_DECLARE_CPU_KERNELS(sliding_window_attention::BackwardKernels, sliding_window_attention_backward)
FASTLM_DECLARE_CPU_KERNELS(sliding_window_attention::UpdateKernels, sliding_window_attention_update)
