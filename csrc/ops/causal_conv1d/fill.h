// From tensors to parameters: what both twins of causal_conv1d do before they call a kernel.
#pragma once

#include "adapter/tensor.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d {

// `x` itself if the kernels can walk it (unit stride over D, or over L), else a contiguous copy.
Tensor usable(const Tensor& x);

// `t` in the layout of `like`: unit stride over the same dimension.
Tensor match_layout(const Tensor& t, const Tensor& like);

void fill_input(Params& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& initial_states, bool silu);
void fill_output(Params& p, const Tensor& out, const Tensor& final_states);

// Returns the contiguous copy of dfinal_states that must outlive the kernels.
Tensor fill_gradients(BackwardParams& p, const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& dx,
                      const Tensor* dinitial_states);

void fill_update(UpdateParams& p, const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& out, bool silu);

}  // namespace fastlm::causal_conv1d
