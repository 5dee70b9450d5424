// Argument checks of moe_dispatch, shared by the CPU and the CUDA twin.
#pragma once

#include <string>
#include <vector>

#include "adapter/check.h"
#include "ops/moe_dispatch/params.h"

namespace fastlm::moe_dispatch {

// Throw unless the call is sound; values of ids and offsets are not looked at.
void check_ids(const char* op, const Tensor& topk_ids, int64_t num_experts);
void check_grouped_gemm(const char* op, const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b);
void check_grouped_gemm_backward(const Tensor& dout, const Tensor& a, const Tensor& b, bool trans_b);
void check_experts(const char* op, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                   const Tensor& topk_ids, const Tensor& topk_weights, const OptionalTensor& gate_up_proj_bias,
                   const OptionalTensor& down_proj_bias, const OptionalTensor& grad_weights);
void check_experts_backward(const Tensor& dout, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& topk_ids,
                            const Tensor& gate_up);

// "silu", "gelu_tanh", "relu" or "relu2".
Activation activation_of(const char* op, const std::string& name);

// Each in [-1, num_experts), in the order of the slots; on the CPU.
std::vector<int32_t> id_values(const char* op, const Tensor& topk_ids, int64_t num_experts);

// From 0, never decreasing, at most `rows`; on the CPU.
std::vector<int64_t> offset_values(const char* op, const Tensor& offsets, int64_t rows);

}  // namespace fastlm::moe_dispatch
