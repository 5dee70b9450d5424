// What the two passes of moe_experts on CUDA share: weights and sorted rows as the products see them, and the plan of a call.
#pragma once

#include "adapter/cuda.h"
#include "adapter/tensor.h"
#include "ops/moe_dispatch/checks.h"
#include "ops/moe_dispatch/cuda/experts.h"

namespace fastlm::moe_dispatch {

namespace gemm = fastlm::cuda::gemm;

inline DType dtype_of(const Tensor& t) { return static_cast<DType>(kernel_index(t.scalar_type())); }

// One matrix per expert, as it lies if one of its dimensions has unit stride, else a copy.
struct DeviceWeight {
  Tensor held;
  gemm::Matrix matrix;
  gemm::Layout layout;
};
// `summed`: the dimension, 1 or 2, that the product sums over.
DeviceWeight device_weight(const Tensor& t, int64_t summed);

// (rows, columns) with unit stride along the columns; a copy if it has none.
Tensor lines_of(const Tensor& t);

// `t` in the accumulation type of `like`, contiguous.
Tensor in_acc(const Tensor& t, const Tensor& like);
OptionalTensor in_acc(const OptionalTensor& t, const Tensor& like);
inline const void* pointer(const OptionalTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }

// The order of picks by expert, on the device.
struct DevicePlan {
  Tensor offsets, perm, inv;
  Tensor token;  // (R,) of each sorted row, (0,) if nobody asked for it
  gemm::Ragged rows;
};
DevicePlan device_plan(const char* op, const Tensor& topk_ids, int64_t experts, bool with_tokens = true);

// Rows of a (T, columns) matrix in the order of the plan: read by index, or copied to `to`, (R, columns), if that is given.
gemm::Matrix sorted_rows(const char* op, const Tensor& t, const DevicePlan& plan, const OptionalTensor& to);
// The matrix that such a copy is. Which backend a product would have with it is asked before there is memory for it, which would
// be aligned as null is.
gemm::Matrix copied_rows(int64_t rows, int64_t columns, const void* data = nullptr);

void combine(const char* op, const Tensor& rows, const DevicePlan& plan, const OptionalTensor& weights, int64_t top_k,
             const Tensor& out);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_experts_backward(
    Tensor dout, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights,
    OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias, OptionalTensor grad_weights, Tensor gate_up,
    std::string activation, bool need_dhidden_states, bool need_dproj, bool need_dtopk_weights);

}  // namespace fastlm::moe_dispatch
