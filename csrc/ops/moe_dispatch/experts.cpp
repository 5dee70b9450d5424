// moe_experts on CPU, both passes. Forward, tokens are taken in chunks: pack rows, the gated product, the product behind it, the
// weighted sum. Backward, experts are taken in waves of a few hundred rows, so that what is held beside the inputs does not grow
// with the number of tokens; the gradient of the hidden states is summed per token when all waves are done.
#include "ops/moe_dispatch/call.h"

namespace fastlm::moe_dispatch {
namespace {

constexpr int64_t kChunkRows = 32768;  // sorted rows of a chunk of tokens
constexpr int64_t kWaveRows = 128;     // packed rows of a wave for every thread, unless one expert alone has more

// What each pick counts, in the accumulation type.
template <class A>
void read_pick_weights(const Tensor& t, A* to) {
  const Tensor flat = torch::stable::contiguous(t);
  const void* from = flat.data_ptr();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    switch (flat.scalar_type()) {
      case ScalarType::BFloat16: {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16;
        to[i] = static_cast<A>(__builtin_bit_cast(float, bits));
        break;
      }
      case ScalarType::Half:
        to[i] = static_cast<A>(static_cast<float>(static_cast<const torch::headeronly::Half*>(from)[i]));
        break;
      case ScalarType::Double:
        to[i] = static_cast<A>(static_cast<const double*>(from)[i]);
        break;
      default:
        to[i] = static_cast<A>(static_cast<const float*>(from)[i]);
    }
  }
}

void* pick_weights(const Tensor& t, ScalarType dtype, Memory& memory) {
  const int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  void* to = memory.bytes(t.numel() * bytes);
  if (dtype == ScalarType::Double) {
    read_pick_weights(t, static_cast<double*>(to));
  } else {
    read_pick_weights(t, static_cast<float*>(to));
  }
  return to;
}

// Weights of the sorted rows.
void* sorted_weights(const void* weights, const Plan& plan, int64_t bytes, Memory& memory) {
  void* to = memory.bytes(plan.rows() * bytes);
  for (int64_t r = 0; r < plan.rows(); ++r) {
    std::copy_n(static_cast<const char*>(weights) + plan.perm[static_cast<size_t>(r)] * bytes, bytes,
                static_cast<char*>(to) + r * bytes);
  }
  return to;
}

}  // namespace

std::tuple<Tensor, Tensor> experts_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids,
                                           Tensor topk_weights, OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias,
                                           OptionalTensor grad_weights, std::string activation, bool keep_gate_up) {
  constexpr const char* op = "moe_experts";
  check_experts(op, hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_proj_bias, down_proj_bias,
                grad_weights);
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), top_k = topk_ids.size(1);
  const int64_t experts = down_proj.size(0), inner = down_proj.size(2), width = gate_up_proj.size(1);
  GateUp gate{};
  gate.activation = activation_of(op, activation);
  const std::vector<int32_t> ids = id_values(op, topk_ids, experts);
  const bool all_used = std::find(ids.begin(), ids.end(), -1) == ids.end();
  const ScalarType dtype = hidden_states.scalar_type();
  const Tensor out = empty({tokens, hidden}, dtype, hidden_states);
  const std::vector<int64_t> kept_shape{tokens * top_k, width};
  const Tensor kept = !keep_gate_up ? no_tensor(dtype, hidden_states)
                      : all_used    ? empty(kept_shape, dtype, hidden_states)
                                    : zeros(kept_shape, dtype, hidden_states);
  if (tokens == 0) return {out, kept};

  const Tile tile(dtype);
  const Tensor x = unit_rows(hidden_states);
  Memory memory(hidden_states);
  const char* weights = static_cast<const char*>(pick_weights(topk_weights, dtype, memory));
  gate.weight = weights_of(gate_up_proj, gate_up_proj_bias);
  gate.gated = width == 2 * inner;
  gate.inner = inner;
  gate.gate_up = keep_gate_up ? kept.data_ptr() : nullptr;
  Product down{};
  down.weight = weights_of(down_proj, down_proj_bias);
  down.out_row_stride = hidden;
  down.out_acc = true;
  const int64_t small = gate.weight.depth_stride == 1 && down.weight.depth_stride == 1 ? kSmallGroup : 0;
  const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_forward);
  const int k = kernel_index(dtype);

  // Where the rows of the next chunk go among all rows of their expert.
  std::vector<int64_t> next(static_cast<size_t>(experts) + 1);
  for (const int32_t id : ids) ++next[static_cast<size_t>(id + 1)];
  next[0] = 0;
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];

  Memory of_chunk(hidden_states);
  const int64_t chunk = std::max<int64_t>(1, std::min(tokens, kChunkRows / top_k));
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const Plan plan(ids.data() + begin * top_k, count * top_k, experts, top_k);
    Wave wave;
    for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
      const int64_t rows = plan.offsets[e + 1] - plan.offsets[e];
      if (rows == 0) continue;
      wave.add(static_cast<int64_t>(e), plan.offsets[e], plan.offsets[e + 1], tile.columns, small);
      wave.groups.back().kept = next[e];
      next[e] += rows;
    }
    of_chunk.again();
    Pack pack{};
    pack.groups = gate.groups = down.groups = wave.view(torch::stable::get_num_threads());
    pack.from = gate.x = source_of(x, &plan.tokens, begin);
    pack.columns = of_chunk.bytes(tile.columns_bytes(wave.packed_rows, hidden));
    gate.x_packed = pack.columns;
    gate.act_packed = of_chunk.bytes(tile.columns_bytes(wave.packed_rows, inner));
    gate.act_rows = of_chunk.bytes(wave.has_small() ? plan.rows() * inner * tile.element_bytes : 0);
    down.x = {gate.act_rows, inner, nullptr, inner};
    down.x_packed = gate.act_packed;
    down.out = of_chunk.bytes(plan.rows() * hidden * tile.bytes);
    const Combine sum{count,           top_k,
                      hidden,          plan.rows(),
                      down.out,        weights + begin * top_k * tile.bytes,
                      plan.inv.data(), static_cast<char*>(out.data_ptr()) + begin * hidden * tile.element_bytes};
    run_pieces(op, wave.blocks(), [&](int64_t piece) { kernels.pack[k](pack, piece); });
    run_pieces(op, wave.count() * ceil_div(inner, gate.gated ? kHalfBlock : kBlock),
               [&](int64_t piece) { kernels.gate_up[k](gate, piece); });
    run_pieces(op, wave.count() * ceil_div(hidden, kBlock), [&](int64_t piece) { kernels.product[k](down, piece); });
    parallel_for(op, count, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, hidden * top_k)),
                 [&](int64_t first, int64_t last) { kernels.combine[k](sum, first, last); });
  }
  return {out, kept};
}

namespace {

// One backward pass over experts in waves.
class Backward {
 public:
  Backward(const Tensor& dout, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
           const OptionalTensor& gate_up_proj_bias, const OptionalTensor& down_proj_bias, const Plan& plan)
      : plan_(plan),
        dtype_(hidden_states.scalar_type()),
        tile_(dtype_),
        memory_(hidden_states),
        x_(source_of(hidden_states, &plan.tokens)),
        dy_(source_of(dout, &plan.tokens)),
        gate_up_proj_(weights_of(gate_up_proj, gate_up_proj_bias)),
        down_proj_(weights_of(down_proj, down_proj_bias)),
        inner_(down_proj.size(2)),
        hidden_(down_proj.size(1)),
        gated_(gate_up_proj.size(1) == 2 * inner_) {}

  // Results; null where they are not wanted.
  void* dhidden_rows = nullptr;  // (R, h) acc
  void* dgate_up_proj = nullptr;
  void* ddown_proj = nullptr;
  void* dgate_up_bias = nullptr;
  void* ddown_bias = nullptr;
  void* dweights = nullptr;  // (T, k)
  DType dgate_up_bias_dtype = DType::kFloat32, ddown_bias_dtype = DType::kFloat32, dweights_dtype = DType::kFloat32;
  // Inputs that only this pass has.
  const void* gate_up = nullptr;  // null: computed again
  const void* expert_weight = nullptr;
  Activation activation = Activation::kSilu;

  void run(const char* op) {
    const auto experts = static_cast<int64_t>(plan_.offsets.size()) - 1;
    const int64_t most = std::clamp<int64_t>(kWaveRows * torch::stable::get_num_threads(), 256, 4096);
    for (int64_t first = 0; first < experts;) {
      Wave wave;
      for (; first < experts; ++first) {
        const int64_t begin = plan_.offsets[static_cast<size_t>(first)], end = plan_.offsets[static_cast<size_t>(first) + 1];
        if (wave.packed_rows > 0 && wave.packed_rows + tile_.round_up(end - begin) > most) break;
        wave.add(first, begin, end, tile_.columns, 0);
      }
      run_wave(op, wave);
    }
  }

 private:
  bool proj() const { return dgate_up_proj != nullptr; }

  void run_wave(const char* op, Wave& wave) {
    memory_.again();
    const auto& forward = FASTLM_CPU_KERNELS(moe_dispatch_forward);
    const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_backward);
    const int k = kernel_index(dtype_);
    const int64_t rows = wave.packed_rows;

    Pack pack_dy{};
    pack_dy.groups = wave.view(torch::stable::get_num_threads());
    pack_dy.from = dy_;
    pack_dy.packed_rows = rows;
    pack_dy.rows = memory_.bytes(tile_.rows_bytes(rows, hidden_));
    if (proj()) pack_dy.depths = memory_.bytes(tile_.depths_bytes(rows, hidden_));
    Pack pack_x = pack_dy;
    pack_x.from = x_;
    pack_x.rows = nullptr;
    if (proj()) pack_x.depths = memory_.bytes(tile_.depths_bytes(rows, hidden_));
    if (gate_up == nullptr) pack_x.columns = memory_.bytes(tile_.columns_bytes(rows, hidden_));

    GateBackward gate{};
    gate.gate_up = gate_up;
    GateUp again{};
    if (gate_up == nullptr) {
      const int64_t first = wave.groups.front().begin;
      for (Group& group : wave.groups) group.kept = group.begin - first;
      again.weight = gate_up_proj_;
      again.x_packed = pack_x.columns;
      again.activation = activation;
      again.gated = gated_;
      again.inner = inner_;
      again.gate_up = memory_.bytes((wave.groups.back().end - first) * gate_up_proj_.rows * tile_.element_bytes);
      gate.gate_up = again.gate_up;
    }
    again.groups = gate.groups = wave.view(torch::stable::get_num_threads());
    gate.down = down_proj_;
    gate.dy = pack_dy.rows;
    gate.packed_rows = rows;
    gate.activation = activation;
    gate.gated = gated_;
    gate.inner = inner_;
    gate.expert_weight = expert_weight;
    const int64_t inner_blocks = ceil_div(inner_, kBlock);
    gate.total_rows = wave.groups.back().end;
    gate.dweight_blocks = memory_.bytes(inner_blocks * gate.total_rows * tile_.bytes);
    gate.dbias = dgate_up_bias;
    gate.dbias_dtype = dgate_up_bias_dtype;
    if (dhidden_rows != nullptr) {
      gate.dgate_rows = memory_.bytes(tile_.rows_bytes(rows, inner_));
      if (gated_) gate.dup_rows = memory_.bytes(tile_.rows_bytes(rows, inner_));
    }
    if (proj()) {
      gate.act_depths = memory_.bytes(tile_.depths_bytes(rows, inner_));
      gate.dgate_depths = memory_.bytes(tile_.depths_bytes(rows, inner_));
      if (gated_) gate.dup_depths = memory_.bytes(tile_.depths_bytes(rows, inner_));
    }

    const int64_t blocks = wave.blocks();
    run_pieces(op, 2 * blocks, [&](int64_t piece) {
      piece < blocks ? forward.pack[k](pack_dy, piece) : forward.pack[k](pack_x, piece - blocks);
    });
    if (gate_up == nullptr) {
      run_pieces(op, wave.count() * ceil_div(inner_, gated_ ? kHalfBlock : kBlock),
                 [&](int64_t piece) { forward.gate_up[k](again, piece); });
    }
    run_pieces(op, wave.count() * inner_blocks, [&](int64_t piece) { kernels.gate[k](gate, piece); });

    RowProduct dx{};
    dx.groups = wave.view(torch::stable::get_num_threads());
    dx.weight = gate_up_proj_;
    dx.segments[0] = {gate.dgate_rows, inner_, 0};
    dx.segments[1] = {gate.dup_rows, inner_, inner_};
    dx.num_segments = gated_ ? 2 : 1;
    dx.out = dhidden_rows;
    dx.out_row_stride = hidden_;
    dx.out_acc = true;
    const Outer of_down{wave.view(torch::stable::get_num_threads()),
                        pack_dy.depths,
                        gate.act_depths,
                        0,
                        rows,
                        hidden_,
                        inner_,
                        ddown_proj,
                        0,
                        hidden_};
    const Outer of_gate{wave.view(torch::stable::get_num_threads()),
                        gate.dgate_depths,
                        pack_x.depths,
                        0,
                        rows,
                        inner_,
                        hidden_,
                        dgate_up_proj,
                        0,
                        gate_up_proj_.rows};
    Outer of_up = of_gate;
    of_up.a = gate.dup_depths;
    of_up.first_row = inner_;
    const BiasGradient bias{wave.view(torch::stable::get_num_threads()), dy_, expert_weight, ddown_bias, ddown_bias_dtype};
    const PickGradient pick{wave.view(torch::stable::get_num_threads()),
                            gate.dweight_blocks,
                            inner_blocks,
                            gate.total_rows,
                            dy_,
                            down_proj_,
                            plan_.perm.data(),
                            dweights,
                            dweights_dtype};
    const int64_t hidden_blocks = ceil_div(hidden_, kBlock);
    const int64_t outer_blocks = proj() ? wave.count() * inner_blocks * hidden_blocks : 0;
    const int64_t ends[] = {dhidden_rows == nullptr ? 0 : wave.count() * hidden_blocks,
                            outer_blocks,
                            outer_blocks,
                            gated_ ? outer_blocks : 0,
                            ddown_bias == nullptr ? 0 : wave.count() * hidden_blocks,
                            dweights == nullptr ? 0 : wave.count()};
    int64_t total = 0;
    for (const int64_t pieces : ends) total += pieces;
    run_pieces(op, total, [&](int64_t piece) {
      int kind = 0;
      for (; piece >= ends[kind]; ++kind) piece -= ends[kind];
      switch (kind) {
        case 0:
          return kernels.row_product[k](dx, piece);
        case 1:
          return kernels.outer[k](of_down, piece);
        case 2:
          return kernels.outer[k](of_gate, piece);
        case 3:
          return kernels.outer[k](of_up, piece);
        case 4:
          return kernels.bias[k](bias, piece);
        default:
          return kernels.pick[k](pick, piece);
      }
    });
  }

  const Plan& plan_;
  ScalarType dtype_;
  Tile tile_;
  Memory memory_;
  Source x_, dy_;
  Weights gate_up_proj_, down_proj_;
  int64_t inner_, hidden_;
  bool gated_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    Tensor dout, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights,
    OptionalTensor gate_up_proj_bias, OptionalTensor down_proj_bias, OptionalTensor grad_weights, Tensor gate_up,
    std::string activation, bool need_dhidden_states, bool need_dproj, bool need_dtopk_weights) {
  constexpr const char* op = "moe_experts_backward";
  check_experts(op, hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_proj_bias, down_proj_bias,
                grad_weights);
  check_experts_backward(dout, hidden_states, gate_up_proj, topk_ids, gate_up);
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), top_k = topk_ids.size(1);
  const int64_t experts = down_proj.size(0), width = gate_up_proj.size(1);
  const Activation kind = activation_of(op, activation);
  const std::vector<int32_t> ids = id_values(op, topk_ids, experts);
  const ScalarType dtype = hidden_states.scalar_type(), acc = accumulation_dtype(dtype);
  const auto output = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType type) {
    return wanted ? empty(shape, type, hidden_states) : no_tensor(type, hidden_states);
  };
  const auto bias_dtype = [&](const OptionalTensor& bias) { return bias.has_value() ? bias->scalar_type() : acc; };
  const Tensor dx = output(need_dhidden_states, {tokens, hidden}, dtype);
  const Tensor dgate_up_proj = output(need_dproj, {experts, width, hidden}, dtype);
  const Tensor ddown_proj = output(need_dproj, {experts, hidden, down_proj.size(2)}, dtype);
  const Tensor dweights = need_dtopk_weights ? zeros({tokens, top_k}, topk_weights.scalar_type(), hidden_states)
                                             : no_tensor(topk_weights.scalar_type(), hidden_states);
  const Tensor dgate_up_bias =
      output(need_dproj && gate_up_proj_bias.has_value(), {experts, width}, bias_dtype(gate_up_proj_bias));
  const Tensor ddown_bias = output(need_dproj && down_proj_bias.has_value(), {experts, hidden}, bias_dtype(down_proj_bias));

  const Tile tile(dtype);
  const Plan plan(ids.data(), tokens * top_k, experts, top_k);
  const Tensor x = unit_rows(hidden_states);
  const Tensor dy = unit_rows(dout);
  const Tensor kept = torch::stable::contiguous(gate_up);
  Memory memory(hidden_states);
  Backward backward(dy, x, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, plan);
  backward.activation = kind;
  backward.gate_up = gate_up.dim() == 2 ? kept.data_ptr() : nullptr;
  backward.expert_weight = sorted_weights(pick_weights(grad_weights.has_value() ? *grad_weights : topk_weights, dtype, memory),
                                          plan, tile.bytes, memory);
  if (need_dhidden_states) backward.dhidden_rows = memory.bytes(plan.rows() * hidden * tile.bytes);
  if (need_dproj) {
    backward.dgate_up_proj = dgate_up_proj.data_ptr();
    backward.ddown_proj = ddown_proj.data_ptr();
  }
  if (need_dproj && gate_up_proj_bias.has_value()) {
    backward.dgate_up_bias = dgate_up_bias.data_ptr();
    backward.dgate_up_bias_dtype = param_dtype(dgate_up_bias);
  }
  if (need_dproj && down_proj_bias.has_value()) {
    backward.ddown_bias = ddown_bias.data_ptr();
    backward.ddown_bias_dtype = param_dtype(ddown_bias);
  }
  if (need_dtopk_weights) {
    backward.dweights = dweights.data_ptr();
    backward.dweights_dtype = param_dtype(dweights);
  }
  backward.run(op);

  if (need_dhidden_states && hidden > 0) {
    const Combine sum{tokens, top_k, hidden, plan.rows(), backward.dhidden_rows, nullptr, plan.inv.data(), dx.data_ptr()};
    const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_forward);
    const int k = kernel_index(dtype);
    parallel_for(op, tokens, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, hidden * top_k)),
                 [&](int64_t first, int64_t last) { kernels.combine[k](sum, first, last); });
  }
  return {dx, dgate_up_proj, ddown_proj, dweights, dgate_up_bias, ddown_bias};
}

}  // namespace fastlm::moe_dispatch
