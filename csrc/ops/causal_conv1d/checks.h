// Argument checks of causal_conv1d, shared by the CPU and the CUDA twin.
#pragma once

#include <string>
#include <vector>

#include "adapter/check.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d {

// Throws unless the call is sound; values behind device pointers are not looked at. Returns whether SiLU is asked for.
bool check_forward(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                   const std::optional<std::string>& activation, const OptionalTensor& cu_seqlens);

void check_backward(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                    const OptionalTensor& cu_seqlens);

bool check_update(const char* op, const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                  const std::optional<std::string>& activation, const OptionalTensor& cache_seqlens,
                  const OptionalTensor& conv_state_indices);

// Number of rows of initial_states and final_states: packed sequences, or rows of the batch.
int64_t num_states(const Tensor& x, const OptionalTensor& cu_seqlens);

// Runs of positions the filter may not look out of, from cu_seqlens or seq_idx (on the CPU); checks their values.
std::vector<Segment> make_segments(const char* op, const Tensor& x, int64_t width, const OptionalTensor& seq_idx,
                                   const OptionalTensor& cu_seqlens, bool has_initial);

}  // namespace fastlm::causal_conv1d
