// selective_scan on CPU: from tensors to the parameters and pieces of work of the kernels.
#include "ops/selective_scan/call.h"

#include <numeric>

namespace fastlm::selective_scan {
namespace {

constexpr int64_t kMaxBlock = 128;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

Activation activation(const Tensor& t) {
  if (t.dim() == 2) return {t.data_ptr(), t.stride(0), t.stride(1), 0};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Parameter parameter(const OptionalTensor& t) {
  if (!t.has_value()) return {nullptr, DType::kFloat32, 0, 0};
  return {t->data_ptr(), param_dtype(*t), t->stride(0), t->dim() == 2 ? t->stride(1) : 0};
}

Projection projection(const Tensor& t) {
  Projection x{};
  x.data = t.data_ptr();
  x.dtype = param_dtype(t);
  x.constant = t.dim() == 2;
  x.groups = t.dim() == 4 ? t.size(1) : 1;
  if (x.constant) {
    x.dim_stride = t.stride(0);
    x.state_stride = t.stride(1);
  } else {
    const bool grouped = t.dim() == 4;
    x.batch_stride = t.stride(0);
    x.group_stride = grouped ? t.stride(1) : 0;
    x.state_stride = t.stride(grouped ? 2 : 1);
    x.seq_stride = t.stride(grouped ? 3 : 2);
  }
  return x;
}

Tensor empty_projection(const Tensor& like) {
  const int64_t rank = like.dim();
  if (rank == 2) return empty({like.size(0), like.size(1)}, like.scalar_type(), like);
  if (rank == 3) return empty_like_layout(like, like.scalar_type());
  if (like.stride(3) == 1 || like.stride(2) != 1) {
    return empty({like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type(), like);
  }
  const Tensor memory = empty({like.size(0), like.size(3), like.size(1), like.size(2)}, like.scalar_type(), like);
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 2), 2, 3);
}

Plan make_plan(const Params& p) {
  Plan plan;
  plan.group_dim = p.dim / p.groups;
  plan.padded_dim = round_up(plan.group_dim, kChannelAlign);
  plan.padded_state = round_up(p.state, kStateGroup);
  const int64_t even = ceil_div(p.num_sequences * p.dim, kWantedItems);
  plan.block = std::clamp<int64_t>(round_up(even, kChannelAlign), kChannelAlign, std::min(kMaxBlock, plan.padded_dim));
  plan.blocks_per_group = ceil_div(plan.group_dim, plan.block);
  plan.num_blocks = plan.blocks_per_group * p.groups;
  return plan;
}

ChannelArrays make_arrays(const Params& p, const Plan& plan) {
  const int64_t channels = p.groups * plan.padded_dim;
  const int64_t pairs = channels * plan.padded_state;
  ChannelArrays arrays{};
  const auto take = [&](int64_t count) {
    const int64_t at = arrays.total;
    arrays.total += count;
    return at;
  };
  arrays.decay = take(pairs);
  arrays.b = p.B.constant ? take(pairs) : 0;
  arrays.c = p.C.constant ? take(pairs) : 0;
  arrays.bound = take(channels);
  arrays.bias = take(channels);
  arrays.skip = take(channels);
  return arrays;
}

Call::Call(const char* op, const Inputs& inputs) : in(inputs), sequences(make_sequences(op, inputs.u, inputs.cu_seqlens)) {
  in.u = unit_stride(in.u);
  in.delta = unit_stride(in.delta);
  if (in.z.has_value()) in.z = unit_stride(*in.z);
}

void fill_params(Params& p, const Inputs& in, const Tensor& chunk_states) {
  p.batch = in.u.size(0);
  p.dim = in.u.size(1);
  p.seqlen = in.u.size(2);
  p.state = in.A.size(1);
  p.delta_softplus = in.delta_softplus;
  p.u = activation(in.u);
  p.delta = activation(in.delta);
  if (in.z.has_value()) p.z = activation(*in.z);
  p.A = parameter(in.A);
  p.D = parameter(in.D);
  p.delta_bias = parameter(in.delta_bias);
  p.B = projection(in.B);
  p.C = projection(in.C);
  p.groups = std::lcm(p.B.groups, p.C.groups);
  if (in.initial_state.has_value()) {
    const Tensor& initial = *in.initial_state;
    p.initial_state = initial.data_ptr();
    p.initial_dtype = param_dtype(initial);
    p.initial_batch_stride = initial.stride(0);
    p.initial_dim_stride = initial.stride(1);
    p.initial_state_stride = initial.stride(2);
  }
  p.chunk_states = chunk_states.data_ptr();
}

void Call::fill(Params& p, const Tensor& chunk_states) const {
  fill_params(p, in, chunk_states);
  p.sequences = sequences.data();
  p.num_sequences = static_cast<int64_t>(sequences.size());
}

void fill_update(UpdateParams& p, const UpdateInputs& in, const Tensor& out) {
  p.batch = in.x.size(0);
  p.dim = in.x.size(1);
  p.state = in.A.size(1);
  p.dt_softplus = in.dt_softplus;
  p.state_data = in.state.data_ptr();
  p.state_dtype = param_dtype(in.state);
  p.state_batch_stride = in.state.stride(0);
  p.state_dim_stride = in.state.stride(1);
  p.state_state_stride = in.state.stride(2);
  p.x = activation(in.x);
  p.dt = activation(in.dt);
  if (in.z.has_value()) p.z = activation(*in.z);
  p.out = activation(out);
  p.A = parameter(in.A);
  p.D = parameter(in.D);
  p.dt_bias = parameter(in.dt_bias);
  const auto matrix = [](const Tensor& t) {
    Projection m{};
    m.data = t.data_ptr();
    m.groups = t.dim() == 3 ? t.size(1) : 1;
    m.batch_stride = t.stride(0);
    m.group_stride = t.dim() == 3 ? t.stride(1) : 0;
    m.state_stride = t.stride(t.dim() - 1);
    return m;
  };
  p.B = matrix(in.B);
  p.C = matrix(in.C);
}

namespace {

const Inputs& checked(const char* op, const Inputs& in) {
  check_forward(op, in.u, in.delta, in.A, in.B, in.C, in.D, in.z, in.delta_bias, in.initial_state, in.cu_seqlens);
  return in;
}

}  // namespace

Forward::Forward(const char* op, const Inputs& inputs, bool return_all_states)
    : call_(op, checked(op, inputs)), kernel_(kernel_index(inputs.u.scalar_type())) {
  const Tensor& u = inputs.u;
  const ScalarType acc = accumulation_type(u);
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = inputs.A.size(1);
  out = empty_like_layout(u, u.scalar_type());
  last_state = empty({num_states(u, inputs.cu_seqlens), dim, state}, acc, u);
  chunk_states = empty({batch, length / kChunk, state, dim}, acc, u);
  all_states = return_all_states ? empty({batch, length, dim, state}, acc, u) : no_tensor(acc, u);
  call_.fill(p_, chunk_states);
  empty_ = p_.dim == 0 || p_.num_sequences == 0;
  if (empty_) return;
  p_.out = activation(out);
  p_.last_state = last_state.data_ptr();
  p_.all_states = return_all_states ? all_states.data_ptr() : nullptr;
  plan_ = make_plan(p_);
  arrays_ = make_arrays(p_, plan_);
  prepared_ = empty({arrays_.total}, acc, u);
}

void Forward::prepare(int64_t begin, int64_t end) const {
  FASTLM_CPU_KERNELS(selective_scan_forward).prepare[kernel_](p_, plan_, arrays_, prepared_.data_ptr(), begin, end);
}

void Forward::scan(int64_t begin, int64_t end) const {
  FASTLM_CPU_KERNELS(selective_scan_forward).forward[kernel_](p_, plan_, arrays_, prepared_.data_ptr(), begin, end);
}

}  // namespace fastlm::selective_scan
