// selective_scan on CPU: the operators. How a call is set up stands in call.cpp.
#include <algorithm>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/selective_scan/call.h"
#include "ops/selective_scan/checks.h"
#include "ops/selective_scan/cpu/kernels.h"

namespace fastlm::selective_scan {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                   OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                                                   OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                   bool return_all_states) {
  constexpr const char* op = "selective_scan";
  const Forward pass(op, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens}, return_all_states);
  parallel_for(op, pass.prepare_pieces(), grain(pass.prepare_work()),
               [&](int64_t begin, int64_t end) { pass.prepare(begin, end); });
  if (pass.scan_pieces() > 0) {
    parallel_for(op, pass.scan_pieces(), grain(pass.scan_work()), [&](int64_t begin, int64_t end) { pass.scan(begin, end); });
  }
  return {pass.out, pass.last_state, pass.chunk_states, pass.all_states};
}

// Where slices of sequences begin: as many slices as give kWantedItems pieces of work, about equally long.
std::vector<int64_t> make_slices(const std::vector<Sequence>& sequences, int64_t num_blocks, int64_t total) {
  const auto count = static_cast<int64_t>(sequences.size());
  const int64_t slices = std::clamp<int64_t>(ceil_div(kWantedItems, num_blocks), 1, count);
  std::vector<int64_t> begin{0};
  int64_t done = 0;
  for (int64_t i = 0; i < count; ++i) {
    done += sequences[static_cast<size_t>(i)].end - sequences[static_cast<size_t>(i)].begin;
    const auto made = static_cast<int64_t>(begin.size());
    if (i + 1 < count && made < slices && done * slices >= total * made) begin.push_back(i + 1);
  }
  begin.push_back(count);
  return begin;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                   OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus, Tensor chunk_states,
                   OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  constexpr const char* op = "selective_scan_backward";
  check_forward(op, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens);
  check_backward(dout, dlast_state, u, A, chunk_states, cu_seqlens);
  const Call call(op, {u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens});
  const ScalarType dtype = u.scalar_type();
  const ScalarType acc = accumulation_type(u);
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = A.size(1);
  const int k = kernel_index(dtype);

  const Tensor grad = unit_stride(dout);
  const Tensor states = torch::stable::contiguous(chunk_states);
  const Tensor dlast = dlast_state.has_value() ? torch::stable::contiguous(*dlast_state) : no_tensor(acc, u);
  const Tensor du = empty_like_layout(u, dtype);
  const Tensor ddelta = empty_like_layout(delta, dtype);
  const Tensor dz = z.has_value() ? empty_like_layout(*z, dtype) : no_tensor(dtype, u);
  const Tensor dB = empty_projection(B), dC = empty_projection(C);
  const Tensor dinitial = initial_state.has_value() ? empty({initial_state->size(0), dim, state}, acc, u) : no_tensor(acc, u);
  // Sums in the accumulation type; converted at the end.
  const Tensor dA = zeros({dim, state}, acc, u), dD = zeros({dim}, acc, u), dbias = zeros({dim}, acc, u);
  Tensor dB_constant = no_tensor(acc, u), dC_constant = no_tensor(acc, u);
  if (B.dim() == 2) dB_constant = zeros({dim, state}, acc, u);
  if (C.dim() == 2) dC_constant = zeros({dim, state}, acc, u);

  BackwardParams p{};
  call.fill(p, states);
  p.dout = activation(grad);
  p.dlast_state = dlast_state.has_value() ? dlast.data_ptr() : nullptr;
  p.du = activation(du);
  p.ddelta = activation(ddelta);
  if (z.has_value()) p.dz = activation(dz);
  p.dinitial_state = initial_state.has_value() ? dinitial.data_ptr() : nullptr;

  if (p.dim > 0 && p.num_sequences > 0) {
    const Plan plan = make_plan(p);
    const ChannelArrays arrays = make_arrays(p, plan);
    const Tensor prepared = empty({arrays.total}, acc, u);
    const auto prepare = FASTLM_CPU_KERNELS(selective_scan_forward).prepare[k];
    parallel_for(op, p.groups * plan.padded_dim / kChannelAlign, grain(4 * kChannelAlign * plan.padded_state),
                 [&](int64_t begin, int64_t end) { prepare(p, plan, arrays, prepared.data_ptr(), begin, end); });
    const std::vector<int64_t> slices = make_slices(call.sequences, plan.num_blocks, batch * length);
    const auto num_slices = static_cast<int64_t>(slices.size()) - 1;
    const Tensor position_partial = empty({plan.num_blocks, 2, batch * length, plan.padded_state}, acc, u);
    const Tensor channel_partial = empty({num_slices, arrays.total}, acc, u);
    const BackwardWork work{slices.data(), num_slices, position_partial.data_ptr(), channel_partial.data_ptr()};

    const auto& kernels = FASTLM_CPU_KERNELS(selective_scan_backward);
    parallel_for(
        op, num_slices * plan.num_blocks, grain(3 * batch * length / num_slices * plan.block * plan.padded_state),
        [&](int64_t begin, int64_t end) { kernels.backward[k](p, plan, arrays, prepared.data_ptr(), work, begin, end); });
    std::vector<Loop> sums;
    const auto sum_positions = [&](int which, const Tensor& to) {
      const Projection target = projection(to);
      sums.push_back({batch * length, plan.num_blocks * plan.padded_state, [&, which, target](int64_t begin, int64_t end) {
                        kernels.reduce_positions[k](p, plan, work, which, target, begin, end);
                      }});
    };
    const auto sum_channels = [&](int64_t array, int64_t columns, const Tensor& to) {
      void* const target = to.data_ptr();
      sums.push_back({dim, num_slices * std::max<int64_t>(1, columns), [&, array, columns, target](int64_t begin, int64_t end) {
                        kernels.reduce_channels[k](p, plan, arrays, work, array, columns, target, begin, end);
                      }});
    };
    B.dim() == 2 ? sum_channels(arrays.b, state, dB_constant) : sum_positions(0, dB);
    C.dim() == 2 ? sum_channels(arrays.c, state, dC_constant) : sum_positions(1, dC);
    sum_channels(arrays.decay, state, dA);
    sum_channels(arrays.skip, 0, dD);
    sum_channels(arrays.bias, 0, dbias);
    parallel_loops(op, sums, kGrain);
  }
  if (p.dim == 0) {  // sums over no channels
    for (Tensor t : {dB, dC}) torch::stable::zero_(t);
  }
  const auto as = [&](const Tensor& t, const OptionalTensor& like) {
    return like.has_value() ? torch::stable::to(t, like->scalar_type()) : no_tensor(acc, u);
  };
  return {du,
          ddelta,
          as(dA, A),
          B.dim() == 2 ? as(dB_constant, B) : dB,
          C.dim() == 2 ? as(dC_constant, C) : dC,
          as(dD, D),
          dz,
          as(dbias, delta_bias),
          as(dinitial, initial_state)};
}

Tensor update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
              OptionalTensor dt_bias, bool dt_softplus, OptionalTensor state_batch_indices) {
  constexpr const char* op = "selective_state_update";
  check_update(op, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices);
  std::vector<int64_t> slots;
  if (state_batch_indices.has_value()) slots = check_slots(state, *state_batch_indices);
  const Tensor out = empty({x.size(0), x.size(1)}, x.scalar_type(), x);

  UpdateParams p{};
  fill_update(p, {state, x, dt, A, B, C, D, z, dt_bias, dt_softplus}, out);
  p.state_batch_indices = state_batch_indices.has_value() ? slots.data() : nullptr;

  const auto& kernels = FASTLM_CPU_KERNELS(selective_scan_update);
  parallel_for(op, p.batch * ceil_div(p.dim, kUpdateBlock), grain(kUpdateBlock * p.state),
               [&](int64_t begin, int64_t end) { kernels.update[kernel_index(x.scalar_type())](p, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastlm::selective_scan

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&fastlm::selective_scan::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&fastlm::selective_scan::backward));
  m.impl("selective_state_update", TORCH_BOX(&fastlm::selective_scan::update));
}
