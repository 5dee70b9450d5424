// selective_scan on CUDA, backward: checks -> parameters -> launch. Values of cu_seqlens are not checked, since that would stop
// the device; the kernels clamp them instead.
#include "adapter/cuda.h"

#include <tuple>

#include "adapter/tensor.h"
#include "ops/selective_scan/cuda/backward_launch.h"
#include "ops/selective_scan/cuda_call.h"

namespace fastlm::selective_scan {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                   OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus, Tensor chunk_states,
                   OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  constexpr const char* op = "selective_scan_backward";
  check_forward(op, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens);
  check_backward(dout, dlast_state, u, A, chunk_states, cu_seqlens);
  const DeviceGuard guard(u.get_device_index());
  const ScalarType dtype = u.scalar_type();
  const auto kernel_dtype = static_cast<DType>(kernel_index(dtype));
  const ScalarType acc = accumulation_type(u);
  const int64_t dim = u.size(1), state = A.size(1);
  const bool constant_b = B.dim() == 2, constant_c = C.dim() == 2;

  const Tensor states = torch::stable::contiguous(chunk_states);
  const Tensor dlast = dlast_state.has_value() ? torch::stable::contiguous(*dlast_state) : no_tensor(acc, u);
  const Tensor du = empty_like_layout(u, dtype);
  const Tensor ddelta = empty_like_layout(delta, dtype);
  const Tensor dz = z.has_value() ? empty_like_layout(*z, dtype) : no_tensor(dtype, u);
  const Tensor dB = constant_b ? empty({dim, state}, acc, u) : empty_projection(B);
  const Tensor dC = constant_c ? empty({dim, state}, acc, u) : empty_projection(C);
  const Tensor dinitial = initial_state.has_value() ? empty({initial_state->size(0), dim, state}, acc, u) : no_tensor(acc, u);
  const Tensor dA = empty({dim, state}, acc, u), dD = empty({dim}, acc, u), dbias = empty({dim}, acc, u);

  cuda::BackwardCall call{};
  BackwardParams& p = call.p;
  fill_params(p, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens}, states);
  DeviceIndices indices;
  indices.fill(p, u, cu_seqlens);
  p.dout = activation(dout);
  p.dlast_state = dlast_state.has_value() ? dlast.data_ptr() : nullptr;
  p.du = activation(du);
  p.ddelta = activation(ddelta);
  if (z.has_value()) p.dz = activation(dz);
  p.dinitial_state = initial_state.has_value() ? dinitial.data_ptr() : nullptr;
  const auto order = [](const Activation& x) { return cuda::order_of(x.dim_stride, x.seq_stride); };
  const auto matrix = [](const Projection& x) { return cuda::order_of(x.state_stride, x.seq_stride); };
  call.order = {order(p.u),  order(p.delta), order(p.z),      order(p.dout), matrix(p.B),
                matrix(p.C), order(p.du),    order(p.ddelta), order(p.dz)};

  if (p.dim == 0 || p.num_sequences == 0) {  // sums over nothing
    for (Tensor t : {dA, dB, dC, dD, dbias}) torch::stable::zero_(t);
  } else {
    cuda::plan_backward(call, kernel_dtype);
    const auto take = [&](int64_t size) { return empty({size}, acc, u); };
    const Tensor position_sums = take(cuda::position_sums_size(call, kernel_dtype));
    const Tensor parameter_sums = take(cuda::parameter_sums_size(call));
    const Tensor carried = take(cuda::carried_size(call, kernel_dtype));
    call.position_sums = constant_b && constant_c ? nullptr : position_sums.data_ptr();
    call.parameter_sums = parameter_sums.data_ptr();
    call.carried = carried.data_ptr();
    OptionalTensor begin_states, end_states, decays;
    if (call.split.part != 0) {
      const int64_t size = call.split.slots * state * dim;
      begin_states = take(size), end_states = take(size), decays = take(size);
      call.split.end_states = end_states->data_ptr();
      call.split.decays = decays->data_ptr();
    }
    cuda::BackwardSums sums{};
    if (!constant_b) sums.dB = projection(dB);
    if (!constant_c) sums.dC = projection(dC);
    sums.dA = dA.data_ptr();
    sums.dD = dD.data_ptr();
    sums.dbias = dbias.data_ptr();
    sums.dB_constant = constant_b ? dB.data_ptr() : nullptr;
    sums.dC_constant = constant_c ? dC.data_ptr() : nullptr;
    check_launch(op, cuda::launch_backward(call, sums, begin_states.has_value() ? begin_states->data_ptr() : nullptr,
                                           kernel_dtype, current_stream(u)));
  }
  const auto as = [&](const Tensor& t, const OptionalTensor& like) {
    return like.has_value() ? torch::stable::to(t, like->scalar_type()) : no_tensor(acc, u);
  };
  return {du,
          ddelta,
          as(dA, A),
          constant_b ? as(dB, B) : dB,
          constant_c ? as(dC, C) : dC,
          as(dD, D),
          dz,
          as(dbias, delta_bias),
          as(dinitial, initial_state)};
}

}  // namespace
}  // namespace fastlm::selective_scan

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("selective_scan_backward", TORCH_BOX(&fastlm::selective_scan::backward));
}
