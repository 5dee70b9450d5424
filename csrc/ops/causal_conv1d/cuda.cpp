// causal_conv1d on CUDA: checks -> parameters -> launch. Values behind device pointers (seq_idx, cu_seqlens, slots) are not
// checked, since that would stop the device; the kernels clamp them instead.
#include "adapter/cuda.h"

#include <string>
#include <tuple>

#include "adapter/tensor.h"
#include "ops/causal_conv1d/checks.h"
#include "ops/causal_conv1d/cuda/launch.h"
#include "ops/causal_conv1d/fill.h"

namespace fastlm::causal_conv1d {
namespace {

using Activation = std::optional<std::string>;

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

// Keeps contiguous copies alive as long as the launch needs them.
struct DeviceInputs {
  OptionalTensor cu_seqlens;

  void fill(Params& p, const OptionalTensor& seq_idx, const OptionalTensor& bounds) {
    if (bounds.has_value()) {
      cu_seqlens = torch::stable::contiguous(*bounds);
      p.device.cu_seqlens = cu_seqlens->data_ptr();
      p.device.cu_seqlens_64 = cu_seqlens->scalar_type() == ScalarType::Long;
      p.device.num_sequences = cu_seqlens->size(0) - 1;
    }
    if (seq_idx.has_value()) {
      p.device.seq_idx = seq_idx->data_ptr();
      p.device.seq_idx_64 = seq_idx->scalar_type() == ScalarType::Long;
      p.device.seq_idx_batch_stride = seq_idx->stride(0);
      p.device.seq_idx_seq_stride = seq_idx->stride(1);
    }
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx,
                                   OptionalTensor initial_states, Activation activation, OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d";
  const bool silu = check_forward(op, x, weight, bias, seq_idx, initial_states, activation, cu_seqlens);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = x.scalar_type();
  const Tensor out = empty_like_layout(x, dtype);
  const Tensor final_states = empty({num_states(x, cu_seqlens), x.size(1), weight.size(1) - 1}, dtype, x);
  const Tensor input = usable(x);

  Params p{};
  fill_input(p, input, weight, bias, initial_states, silu);
  fill_output(p, out, final_states);
  DeviceInputs device;
  device.fill(p, seq_idx, cu_seqlens);
  check_launch(op, cuda::launch_forward(p, dtype_of(x), current_stream(x)));
  return {out, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                                                    OptionalTensor bias, OptionalTensor seq_idx, OptionalTensor initial_states,
                                                    Activation activation, OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d_backward";
  const bool silu = check_forward(op, x, weight, bias, seq_idx, initial_states, activation, cu_seqlens);
  check_backward(dout, dfinal_states, x, weight, cu_seqlens);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = x.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  const Tensor input = usable(x);
  const Tensor grad = match_layout(dout, input);
  const Tensor dx = empty_like_layout(input, dtype);
  const int64_t states = num_states(x, cu_seqlens);
  const Tensor dinitial =
      initial_states.has_value() ? empty({states, x.size(1), weight.size(1) - 1}, dtype, x) : no_tensor(dtype, x);

  BackwardParams p{};
  fill_input(p, input, weight, bias, initial_states, silu);
  const Tensor dfinal = fill_gradients(p, grad, dfinal_states, dx, initial_states.has_value() ? &dinitial : nullptr);
  DeviceInputs device;
  device.fill(p, seq_idx, cu_seqlens);
  const Tensor partial = empty({cuda::num_partials(p, dtype_of(x)), p.width + 1, p.dim}, acc, x);
  const Tensor dweight = empty({p.dim, p.width}, weight.scalar_type(), x);
  const Tensor dbias = bias.has_value() ? empty({p.dim}, bias->scalar_type(), x) : no_tensor(acc, x);
  p.partial = partial.data_ptr();
  check_launch(op, cuda::launch_backward(p, dtype_of(x), dweight.data_ptr(), bias.has_value() ? dbias.data_ptr() : nullptr,
                                         current_stream(x)));
  return {dx, dweight, dbias, dinitial};
}

Tensor update(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias, Activation activation,
              OptionalTensor cache_seqlens, OptionalTensor conv_state_indices) {
  constexpr const char* op = "causal_conv1d_update";
  const bool silu = check_update(op, x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices);
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = x.dim() == 2 ? empty({x.size(0), x.size(1)}, x.scalar_type(), x) : empty_like_layout(x, x.scalar_type());
  UpdateParams p{};
  fill_update(p, x, conv_state, weight, bias, out, silu);
  if (cache_seqlens.has_value()) {
    p.device.cache_seqlens = cache_seqlens->data_ptr();
    p.device.cache_seqlens_stride = cache_seqlens->stride(0);
    p.device.cache_seqlens_64 = cache_seqlens->scalar_type() == ScalarType::Long;
  }
  if (conv_state_indices.has_value()) {
    p.device.conv_state_indices = conv_state_indices->data_ptr();
    p.device.conv_state_indices_stride = conv_state_indices->stride(0);
    p.device.conv_state_indices_64 = conv_state_indices->scalar_type() == ScalarType::Long;
  }
  check_launch(op, cuda::launch_update(p, dtype_of(x), current_stream(x)));
  return out;
}

}  // namespace
}  // namespace fastlm::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("causal_conv1d", TORCH_BOX(&fastlm::causal_conv1d::forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&fastlm::causal_conv1d::backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&fastlm::causal_conv1d::update));
}
