// What the CPU entry points of moe_dispatch share: scratch memory of a call, weights and sources as the kernels see them.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "adapter/pipeline.h"
#include "adapter/tensor.h"
#include "ops/moe_dispatch/checks.h"
#include "ops/moe_dispatch/cpu/kernels.h"
#include "ops/moe_dispatch/plan.h"

namespace fastlm::moe_dispatch {

// Scratch memory that lives as long as the call. After `again` the same requests, in the same order, find the same memory if it
// is large enough: what is done many times in a call touches fresh pages once.
class Memory {
 public:
  explicit Memory(const Tensor& like) : like_(like) {}
  void* bytes(int64_t n) {
    if (next_ == held_.size()) held_.push_back(empty({std::max<int64_t>(n, 1)}, ScalarType::Byte, like_));
    Tensor& block = held_[next_++];
    if (block.numel() < n) block = empty({n}, ScalarType::Byte, like_);
    return block.data_ptr();
  }
  void again() { next_ = 0; }

 private:
  Tensor like_;
  std::vector<Tensor> held_;
  size_t next_ = 0;
};

// Tiles of the element type at the CPU level in use.
struct Tile {
  int64_t columns;   // N
  int64_t elements;  // per operand
  int64_t bytes;     // of an operand, and of the accumulation type
  int64_t element_bytes;

  explicit Tile(ScalarType dtype);
  int64_t operands(int64_t values) const { return ceil_div(values, elements); }
  // Bytes of packed layouts: columns of B over `rows`; rows of A over `rows`; either over `columns` with k = `rows`.
  int64_t columns_bytes(int64_t rows, int64_t depth) const { return rows * operands(depth) * bytes; }
  int64_t rows_bytes(int64_t rows, int64_t depth) const { return rows * round_up(operands(depth)) * bytes; }
  int64_t depths_bytes(int64_t rows, int64_t width) const { return operands(rows) * round_up(width) * bytes; }
  int64_t round_up(int64_t n) const { return ceil_div(n, columns) * columns; }
};

// (E, rows, depth) in any strides. `bias`: (E, rows).
Weights weights_of(const Tensor& t, const OptionalTensor& bias);
// The weight read the other way round: (E, depth, rows).
Weights transposed(Weights w);
// Rows as they are where they have unit stride, else a copy.
Tensor unit_rows(const Tensor& t);
Source source_of(const Tensor& rows, const std::vector<int64_t>* index, int64_t first = 0);

std::tuple<Tensor, Tensor> experts_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids,
                                           Tensor topk_weights, OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias,
                                           OptionalTensor grad_weights, std::string activation, bool keep_gate_up);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    Tensor dout, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights,
    OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias, OptionalTensor grad_weights, Tensor gate_up,
    std::string activation, bool need_dhidden_states, bool need_dproj, bool need_dtopk_weights);

}  // namespace fastlm::moe_dispatch
