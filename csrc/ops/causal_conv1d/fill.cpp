// From tensors to parameters of causal_conv1d.
#include "ops/causal_conv1d/fill.h"

namespace fastlm::causal_conv1d {

Tensor usable(const Tensor& x) { return is_channel_last(x) || x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

Tensor match_layout(const Tensor& t, const Tensor& like) {
  if (!is_channel_last(like)) return t.stride(2) == 1 ? t : torch::stable::contiguous(t);
  if (t.stride(1) == 1) return t;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 1, 2)), 1, 2);
}

void fill_input(Params& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& initial_states, bool silu) {
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.width = weight.size(1);
  p.silu = silu;
  p.x = x.data_ptr();
  p.x_batch_stride = x.stride(0);
  p.x_dim_stride = x.stride(1);
  p.x_seq_stride = x.stride(2);
  p.weight = weight.data_ptr();
  p.weight_dtype = param_dtype(weight);
  p.weight_dim_stride = weight.stride(0);
  p.weight_width_stride = weight.stride(1);
  if (bias.has_value()) {
    p.bias = bias->data_ptr();
    p.bias_dtype = param_dtype(*bias);
    p.bias_stride = bias->stride(0);
  }
  if (initial_states.has_value()) {
    p.initial_states = initial_states->data_ptr();
    p.initial_batch_stride = initial_states->stride(0);
    p.initial_dim_stride = initial_states->stride(1);
    p.initial_width_stride = initial_states->stride(2);
  }
}

void fill_output(Params& p, const Tensor& out, const Tensor& final_states) {
  p.out = out.data_ptr();
  p.out_batch_stride = out.stride(0);
  p.out_dim_stride = out.stride(1);
  p.out_seq_stride = out.stride(2);
  p.final_states = final_states.data_ptr();
}

Tensor fill_gradients(BackwardParams& p, const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& dx,
                      const Tensor* dinitial_states) {
  p.dout = dout.data_ptr();
  p.dout_batch_stride = dout.stride(0);
  p.dout_dim_stride = dout.stride(1);
  p.dout_seq_stride = dout.stride(2);
  p.dx = dx.data_ptr();
  p.dx_batch_stride = dx.stride(0);
  p.dx_dim_stride = dx.stride(1);
  p.dx_seq_stride = dx.stride(2);
  if (dinitial_states != nullptr) p.dinitial_states = dinitial_states->data_ptr();
  if (!dfinal_states.has_value()) return dout;
  Tensor dfinal = torch::stable::contiguous(*dfinal_states);
  p.dfinal_states = dfinal.data_ptr();
  return dfinal;
}

void fill_update(UpdateParams& p, const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& out, bool silu) {
  const bool one = x.dim() == 2;
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.num_tokens = one ? 1 : x.size(2);
  p.width = weight.size(1);
  p.state_len = conv_state.size(2);
  p.num_slots = conv_state.size(0);
  p.silu = silu;
  p.x = x.data_ptr();
  p.x_batch_stride = x.stride(0);
  p.x_dim_stride = x.stride(1);
  p.x_seq_stride = one ? 0 : x.stride(2);
  p.out = out.data_ptr();
  p.out_batch_stride = out.stride(0);
  p.out_dim_stride = out.stride(1);
  p.out_seq_stride = one ? 0 : out.stride(2);
  p.conv_state = conv_state.data_ptr();
  p.state_batch_stride = conv_state.stride(0);
  p.state_dim_stride = conv_state.stride(1);
  p.state_len_stride = conv_state.stride(2);
  p.weight = weight.data_ptr();
  p.weight_dtype = param_dtype(weight);
  p.weight_dim_stride = weight.stride(0);
  p.weight_width_stride = weight.stride(1);
  if (bias.has_value()) {
    p.bias = bias->data_ptr();
    p.bias_dtype = param_dtype(*bias);
    p.bias_stride = bias->stride(0);
  }
}

}  // namespace fastlm::causal_conv1d
