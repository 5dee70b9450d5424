// Argument checks of selective_scan, shared by the CPU and the CUDA twin.
#pragma once

#include <vector>

#include "adapter/check.h"
#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan {

// Throws unless the call is sound; values behind device pointers are not looked at.
void check_forward(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens);

void check_backward(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& A,
                    const Tensor& chunk_states, const OptionalTensor& cu_seqlens);

void check_update(const char* op, const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                  const OptionalTensor& state_batch_indices);

// Rows of initial_state and last_state: packed sequences, or rows of the batch.
int64_t num_states(const Tensor& u, const OptionalTensor& cu_seqlens);

// The accumulation type of a call: float32, or float64 for float64.
ScalarType accumulation_type(const Tensor& u);

// The sequences to scan, from cu_seqlens (on the CPU; its values are checked) or the batch.
std::vector<Sequence> make_sequences(const char* op, const Tensor& u, const OptionalTensor& cu_seqlens);

// Slot of each row (on the CPU), checked: below the number of slots, and none twice.
std::vector<int64_t> check_slots(const Tensor& state, const Tensor& state_batch_indices);

}  // namespace fastlm::selective_scan
