// Launches of moe_experts and its backward pass. Letters as in params.h; R = T k here: what the device knows of groups, the host
// does not, so buffers and grids are for the most rows there can be. "acc" is the accumulation type.
#pragma once

#include "core/cuda/gemm/gemm.h"
#include "ops/moe_dispatch/params.h"

namespace fastlm::moe_dispatch::cuda {

namespace gemm = fastlm::cuda::gemm;

inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A product of sorted rows with each expert's matrix.
struct ExpertProduct {
  gemm::RowProduct product;
  gemm::Layout layout;  // of the weight
  gemm::Backend backend;
};

// act[r] = f(gate) * up with (gate, up) = W[e(r)] x[r] + bias, gate rows first; f(up) where there is no gate.
struct GateCall {
  ExpertProduct of;  // n: I
  bool gated;
  Activation activation;
  const void* bias;  // (E, rows of the weight) acc, or null
  void* act;         // (R, I) or null
  void* gate_up;     // (R, rows of the weight) or null
};

// out[r] = W[e(r)] a[r] + bias.
struct DownCall {
  ExpertProduct of;
  const void* bias;  // (E, n) acc, or null
  void* out;         // (R, n)
};

// da = dy down_proj with the activation's derivative behind it.
struct GateBackwardCall {
  ExpertProduct of;  // n: I
  bool gated;
  Activation activation;
  const void* gate_up;  // (R, rows of gate_up_proj)
  const void* weight;   // (R,) acc: what an expert's output counts, for its gradient
  void* dgate_up;       // (R, rows of gate_up_proj) or null; may be gate_up
  void* weighted_act;   // (R, I): weight * act; or null
  void* shares;         // (slabs of n, R) acc: <da, act> of each slab; or null
};

struct OuterCall {
  gemm::OuterProduct product;
  gemm::Backend backend;
  void* out;  // (E, m, n)
};

// weight[r] = weights[perm[r]].
struct WeightsCall {
  const int32_t* perm;  // (R,)
  int64_t rows;
  const void* weights;  // (T, k) acc
  void* weight;         // (R,) acc
};

// to[r] = from[token[r]] for the rows of experts.
struct CopyCall {
  gemm::Ragged rows;
  const void* from;  // (T, columns)
  int64_t row_stride, columns, tokens;
  const int32_t* token;  // (R,)
  void* to;              // (R, columns)
};

// Rows behind the last group become 0.
struct ClearCall {
  gemm::Ragged rows;
  void* data;  // (R, columns)
  int64_t columns;
};

// y[t] = sum over j of weights[t, j] rows[inv[t, j]], in order of j; picks without an expert are left out.
struct CombineCall {
  gemm::Ragged of;
  const void* rows;     // (R, columns)
  const int32_t* inv;   // (T, k)
  const void* weights;  // (T, k) acc; null: all 1
  int64_t tokens, top_k, columns;
  void* y;  // (T, columns)
};

// out[e, c] = sum over the rows of each expert of weight[r] from[r, c].
struct SumsCall {
  gemm::Ragged rows;
  gemm::Matrix from;
  int64_t columns;
  const void* weight;  // (R,) acc; null: all 1
  int64_t splits;      // of each expert's rows
  void* partial;       // (E, splits, columns) acc
  void* out;           // (E, columns) in `dtype`
  DType dtype;
};
constexpr int64_t sum_splits(int64_t experts) { return experts >= 256 ? 1 : experts <= 16 ? 16 : 256 / experts; }

// out[perm[r]] = shares of row r, in order, and <dy[r], bias[e(r)]> where there is a bias; 0 for rows of no expert.
struct PickGradientCall {
  gemm::Ragged rows;
  const void* shares;  // (slabs, R) acc
  int64_t slabs;
  gemm::Matrix dy;  // lines are those of sorted rows
  int64_t columns;
  const void* bias;  // (E, columns) acc, or null
  const int32_t* perm;
  void* out;  // (T, k) in `out_dtype`
  DType out_dtype;
};

// `dtype`: of hidden_states.
cudaError_t launch_gate(const GateCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_down(const DownCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_gate_backward(const GateBackwardCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_outer(const OuterCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_weights(const WeightsCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_copy(const CopyCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_clear(const ClearCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_combine(const CombineCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_sums(const SumsCall& call, DType dtype, cudaStream_t stream);
cudaError_t launch_pick_gradient(const PickGradientCall& call, DType dtype, cudaStream_t stream);

// Of one element type, each in a file of its own.
template <class T>
cudaError_t gate_of(const GateCall& call, cudaStream_t stream);
template <class T>
cudaError_t down_of(const DownCall& call, cudaStream_t stream);
template <class T>
cudaError_t gate_backward_of(const GateBackwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t outer_of(const OuterCall& call, cudaStream_t stream);

}  // namespace fastlm::moe_dispatch::cuda
