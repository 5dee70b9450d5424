// How a call of sliding_window_attention on CPU is set up: parameters, blocks of queries, and its forward pass as pieces of work,
// which an operator that runs the attention beside something else takes among its own.
#pragma once

#include <vector>

#include "adapter/tensor.h"
#include "ops/sliding_window_attention/checks.h"
#include "ops/sliding_window_attention/cpu/kernels.h"

namespace fastlm::sliding_window_attention {

// `t` itself if its last dimension has unit stride (or one element), else a contiguous copy.
Tensor unit_inner_stride(const Tensor& t);

template <class Rows>
Rows rows_of(const Tensor& t) {
  const int64_t n = t.dim();
  return {t.data_ptr(), n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
}

void fill_params(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                 const Options& options, const std::vector<Sequence>& sequences);

// What fill_params leaves open of the backward pass; `row_delta` is contiguous.
void fill_gradients(BackwardParams& p, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq, const Tensor& dk,
                    const Tensor& dv, const Tensor& row_delta);

// Blocks of all sequences and key heads, in order.
std::vector<QueryBlock> query_blocks(const std::vector<Sequence>& sequences, int64_t kv_heads, int64_t queries_per_block);

// The tensors of a call.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
};

// A forward pass as pieces of unequal size that need nothing of each other. Checks all arguments.
class Forward {
 public:
  Forward(const char* op, const Inputs& inputs, const Options& options);
  Forward(const Forward&) = delete;
  Forward& operator=(const Forward&) = delete;

  int64_t pieces() const { return static_cast<int64_t>(blocks_.size()); }
  void attend(int64_t begin, int64_t end) const { kernel_(p_, blocks_.data(), begin, end); }

  Tensor out, lse;

 private:
  Inputs in_;
  std::vector<Sequence> sequences_;
  Params p_{};
  std::vector<QueryBlock> blocks_;
  ForwardKernel kernel_ = nullptr;
};

// The arguments of a decoding step.
struct UpdateInputs {
  Tensor q, k, v, k_cache, v_cache, cache_seqlens;
  std::vector<int64_t> window_size;
  std::optional<double> softmax_scale;
  OptionalTensor rotary_cos, rotary_sin;
};

// Parameters of a step that is not empty, without cache_seqlens; may replace q, k and v by copies, which must outlive the
// kernels.
void fill_update(UpdateParams& p, UpdateInputs& in, const Tensor& out);

// A decoding step as three lists of pieces; all of one must be done before the next begins. Checks all arguments.
class Update {
 public:
  enum Phase { kWrite, kAttend, kMerge };

  Update(const char* op, const UpdateInputs& inputs);
  Update(const Update&) = delete;
  Update& operator=(const Update&) = delete;

  int64_t pieces(Phase phase) const;
  int64_t work(Phase phase) const;  // multiply-adds of a piece
  void run(Phase phase, int64_t begin, int64_t end) const;

  Tensor out;

 private:
  UpdateInputs in_;
  std::vector<int64_t> seen_;
  UpdateParams p_{};
  UpdateWorkspace w_{};
  std::vector<Tensor> memory_;
  int64_t held_ = 0, rows_ = 0;  // keys a token sees at most; queries per key head
  int kernel_ = 0;
};

}  // namespace fastlm::sliding_window_attention
