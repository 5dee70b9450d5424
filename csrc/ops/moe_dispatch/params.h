// What the kernels of moe_dispatch see: plain pointers and strides (in elements). Letters: T tokens, k picks of a token, E
// experts, R sorted rows (the picks that go to an expert, in the order of the experts), h hidden size, I inner size. "acc" is the
// accumulation type: float, or double for double.
//
// Forward, a product has one row per row of the weight and one lane per sorted row: weights are packed as they lie, and what the
// first product leaves is what the second reads. Backward, it has one row per sorted row and lanes along the weight's columns:
// then nothing is transposed at all. Packed memory: core/simd/packed_gemm.h.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::moe_dispatch {

// Multiples of every level's tile. kBlock: rows of a weight forward, of gate and up half each; columns of it backward; rows and
// columns of its gradient. kRowBlock: sorted rows that meet it at a time.
constexpr int64_t kBlock = 192;
constexpr int64_t kHalfBlock = kBlock / 2;
constexpr int64_t kRowBlock = 384;
// Operands along the depth of a weight that are packed at a time. A packed chunk, the sums of a block and the chunk that comes
// next fit the second-level cache together.
constexpr int64_t kChunk = 192;
// Groups of up to so many rows are multiplied row by row, straight from the weight: memory bounds them, not arithmetic.
constexpr int64_t kSmallGroup = 8;

enum class Activation : int32_t { kSilu, kGeluTanh, kRelu, kRelu2 };

// Sorted rows [begin, end) of one expert.
struct Group {
  int64_t expert;
  int64_t begin, end;
  int64_t packed;  // first row in packed buffers, where groups begin at whole tiles
  int64_t padded;  // rows there
  int64_t kept;    // first row in gate_up
  bool small;      // not packed
};

struct Groups {
  const Group* group;
  int64_t count;
  int64_t threads;  // a thread that has done piece i probably does piece i + threads next: what that reads is fetched ahead
};

// One matrix per expert.
struct Weights {
  const void* data;  // (E, rows, depth)
  int64_t expert_stride, row_stride, depth_stride;
  int64_t rows, depth;
  const void* bias;  // (E, rows) or null
  DType bias_dtype;
  int64_t bias_expert_stride, bias_stride;
};

// Rows of a matrix with unit stride along the columns, picked by index.
struct Source {
  const void* data;
  int64_t row_stride;
  const int64_t* index;  // (R,) row for each sorted row; null: the sorted row itself
  int64_t columns;
};

// Forward. out[r] = W[e(r)] x[r] (+ bias).
struct Product {
  Groups groups;
  Weights weight;
  Source x;              // read by small groups
  const void* x_packed;  // columns of B over packed rows, k = depth
  void* out;             // (R, rows): acc if out_acc, else the element type
  int64_t out_row_stride;
  bool out_acc;
};

// Forward. act[r] = f(gate) * up with (gate, up) = W[e(r)] x[r] (+ bias), gate rows first; f(up) where there is no gate.
struct GateUp {
  Groups groups;
  Weights weight;        // 2 I rows, or I without a gate
  Source x;              // read by small groups
  const void* x_packed;  // columns of B over packed rows, k = depth
  Activation activation;
  bool gated;
  int64_t inner;     // I
  void* act_packed;  // columns of B over packed rows, k = I
  void* act_rows;    // (R, I) element type: rows of small groups
  void* gate_up;     // (R, rows) element type, or null
};

// y[t] = sum over j of weight[t, j] rows[inv[t, j]]; picks whose row is num_rows or more have no expert and are left out.
struct Combine {
  int64_t tokens, top_k, columns;
  int64_t num_rows;
  const void* rows;     // (num_rows, columns) acc
  const void* weights;  // (T, k) acc; null: all 1
  const int32_t* inv;   // (T, k)
  void* y;              // (T, columns) contiguous
};

// Packing of rows of a source for one of the layouts; groups of a wave only.
struct Pack {
  Groups groups;
  Source from;
  int64_t packed_begin;  // packed row that the buffers begin with
  int64_t packed_rows;   // rows that they hold
  void* columns;         // columns of B over packed rows, k = columns; or null
  void* rows;            // rows of A over packed rows, k = columns; or null
  void* depths;          // columns of B over columns, k = packed rows; or null
};

// One stretch of the depth of a product: its rows of A, and its rows of the weight.
struct Segment {
  const void* a;  // rows of A over packed rows, k = depth
  int64_t depth;
  int64_t weight_row;  // first row of the weight
};

// Backward. out[r] = sum over segments of a[r] W[e(r)], W's rows being the depth and its columns those of the result.
struct RowProduct {
  Groups groups;
  Weights weight;
  Segment segments[2];
  int64_t num_segments;
  int64_t packed_begin;
  void* out;  // (R, columns): acc if out_acc, else the element type
  int64_t out_row_stride;
  bool out_acc;
};

// Backward. The product of dy and down_proj with the activation's derivative behind it.
struct GateBackward {
  Groups groups;
  Weights down;    // its rows are the depth of this product
  const void* dy;  // rows of A over packed rows, k = h
  int64_t packed_begin;
  int64_t packed_rows;  // that the buffers hold
  Activation activation;
  bool gated;
  int64_t inner;
  const void* gate_up;        // rows of Group::kept, (rows, rows of gate_up_proj) element type
  const void* expert_weight;  // (R,) acc: what an expert's output counts, for its gradient
  // Per block of kBlock inner columns and sorted row: <da, act>, the block's share of the pick's own gradient. (blocks, R) acc
  void* dweight_blocks;
  int64_t total_rows;  // R
  void* act_depths;    // weight * act: columns of B over I, k = packed rows; or null
  void* dgate_rows;    // rows of A over packed rows, k = I; or null
  void* dup_rows;      // the same; only with a gate: without one, the gradient of the pre-activation is dgate
  void* dgate_depths;  // transposed A over I, k = packed rows; or null
  void* dup_depths;
  void* dbias;  // (E, rows of gate_up_proj) in dbias_dtype, or null
  DType dbias_dtype;
};

// Backward. out[e] = A^T B over the rows of each expert.
struct Outer {
  Groups groups;  // groups of experts without rows are among them: their gradient is 0
  const void* a;  // transposed A over rows of the result, k = packed rows
  const void* b;  // columns of B over columns of the result, k = packed rows
  int64_t packed_begin;
  int64_t packed_rows;  // that the buffers hold
  int64_t rows, columns;
  void* out;  // (E, out_rows, columns) contiguous; rows [first_row, first_row + rows)
  int64_t first_row, out_rows;
};

// Backward. out[e, c] = sum over the rows of each expert of expert_weight[r] dy[r, c]: the gradient of down_proj's bias.
struct BiasGradient {
  Groups groups;
  Source dy;
  const void* expert_weight;  // (R,) acc
  void* out;                  // (E, columns) in `dtype`
  DType dtype;
};

// Backward. The gradient of each pick's weight: the blocks of GateBackward, and <dy, bias> where down_proj has one.
struct PickGradient {
  Groups groups;
  const void* dweight_blocks;  // (blocks, R) acc
  int64_t blocks, total_rows;
  Source dy;
  Weights down;         // its bias
  const int32_t* perm;  // (R,) slot of each sorted row
  void* dweights;       // (T, k) in `dtype`; slots without an expert are not written
  DType dtype;
};

}  // namespace fastlm::moe_dispatch
