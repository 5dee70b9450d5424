// causal_conv1d on CPU: checks -> parameters -> kernels of the CPU level in use.
#include <algorithm>
#include <string>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/causal_conv1d/checks.h"
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/fill.h"

namespace fastlm::causal_conv1d {
namespace {

using Activation = std::optional<std::string>;

int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work_per_item)); }

// First tile of every segment, and the total at the end.
std::vector<int64_t> number_tiles(const std::vector<Segment>& segments) {
  std::vector<int64_t> first(segments.size() + 1, 0);
  for (size_t i = 0; i < segments.size(); ++i) {
    first[i + 1] = first[i] + ceil_div(segments[i].end - segments[i].begin, kTile);
  }
  return first;
}

std::vector<double> prepared_weight(const Params& p, ScalarType dtype) {
  std::vector<double> buffer(static_cast<size_t>((p.width + 1) * p.dim));  // doubles: large enough and aligned for either type
  FASTLM_CPU_KERNELS(causal_conv1d_forward).prepare_weight[kernel_index(dtype)](p, buffer.data());
  return buffer;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx,
                                   OptionalTensor initial_states, Activation activation, OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d";
  const bool silu = check_forward(op, x, weight, bias, seq_idx, initial_states, activation, cu_seqlens);
  const ScalarType dtype = x.scalar_type();
  const auto segments = make_segments(op, x, weight.size(1), seq_idx, cu_seqlens, initial_states.has_value());
  const Tensor out = empty_like_layout(x, dtype);
  const Tensor final_states = empty({num_states(x, cu_seqlens), x.size(1), weight.size(1) - 1}, dtype, x);
  const Tensor input = usable(x);

  Params p{};
  fill_input(p, input, weight, bias, initial_states, silu);
  fill_output(p, out, final_states);
  p.segments = segments.data();
  p.num_segments = static_cast<int64_t>(segments.size());

  const auto& kernels = FASTLM_CPU_KERNELS(causal_conv1d_forward);
  const int k = kernel_index(dtype);
  const auto prepared = prepared_weight(p, dtype);
  if (is_channel_last(input)) {
    const auto tiles = number_tiles(segments);
    parallel_for(op, tiles.back(), grain(kTile * p.dim),
                 [&](int64_t begin, int64_t end) { kernels.forward_rows[k](p, prepared.data(), tiles.data(), begin, end); });
  } else {
    parallel_for(op, p.num_segments * p.dim, grain(p.seqlen),
                 [&](int64_t begin, int64_t end) { kernels.forward_channels[k](p, prepared.data(), begin, end); });
  }
  kernels.final_states[k](p, 0, p.num_segments * p.dim);
  return {out, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                                                    OptionalTensor bias, OptionalTensor seq_idx, OptionalTensor initial_states,
                                                    Activation activation, OptionalTensor cu_seqlens) {
  constexpr const char* op = "causal_conv1d_backward";
  const bool silu = check_forward(op, x, weight, bias, seq_idx, initial_states, activation, cu_seqlens);
  check_backward(dout, dfinal_states, x, weight, cu_seqlens);
  const ScalarType dtype = x.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  const auto segments = make_segments(op, x, weight.size(1), seq_idx, cu_seqlens, initial_states.has_value());
  const Tensor input = usable(x);
  const Tensor grad = match_layout(dout, input);
  const Tensor dx = empty_like_layout(input, dtype);
  const Tensor dinitial = initial_states.has_value() ? empty({initial_states->size(0), x.size(1), weight.size(1) - 1}, dtype, x)
                                                     : no_tensor(dtype, x);
  const bool rows = is_channel_last(input);
  const auto tiles = number_tiles(segments);

  BackwardParams p{};
  fill_input(p, input, weight, bias, initial_states, silu);
  const Tensor dfinal = fill_gradients(p, grad, dfinal_states, dx, initial_states.has_value() ? &dinitial : nullptr);
  p.segments = segments.data();
  p.num_segments = static_cast<int64_t>(segments.size());
  const int64_t pieces = rows ? tiles.back() : p.num_segments;
  const Tensor partial = empty({pieces, p.width + 1, p.dim}, acc, x);
  p.partial = partial.data_ptr();

  const auto& kernels = FASTLM_CPU_KERNELS(causal_conv1d_backward);
  const int k = kernel_index(dtype);
  const auto prepared = prepared_weight(p, dtype);
  // An empty segment has no tile, but its initial state still takes the final state's gradient.
  for (const Segment& s : segments) {
    if (s.begin != s.end || s.initial < 0) continue;
    const int64_t bytes = p.dim * (p.width - 1) * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
    char* to = static_cast<char*>(p.dinitial_states) + s.initial * bytes;
    if (p.dfinal_states != nullptr) {
      std::copy_n(static_cast<const char*>(p.dfinal_states) + s.final_state * bytes, bytes, to);
    } else {
      std::fill_n(to, bytes, 0);
    }
  }
  if (rows) {
    parallel_for(op, pieces, grain(4 * kTile * p.dim),
                 [&](int64_t begin, int64_t end) { kernels.backward_rows[k](p, prepared.data(), tiles.data(), begin, end); });
  } else {
    parallel_for(op, p.num_segments * p.dim, grain(4 * p.seqlen),
                 [&](int64_t begin, int64_t end) { kernels.backward_channels[k](p, prepared.data(), begin, end); });
  }
  const Tensor dweight = empty({p.dim, p.width}, acc, x);
  const Tensor dbias = empty({p.dim}, acc, x);
  parallel_for(op, p.dim, grain(pieces * (p.width + 1)), [&](int64_t begin, int64_t end) {
    kernels.reduce_partial[k](partial.data_ptr(), pieces, p.dim, p.width, dweight.data_ptr(), dbias.data_ptr(), begin, end);
  });
  return {dx, torch::stable::to(dweight, weight.scalar_type()),
          bias.has_value() ? torch::stable::to(dbias, bias->scalar_type()) : no_tensor(acc, x), dinitial};
}

Tensor update(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias, Activation activation,
              OptionalTensor cache_seqlens, OptionalTensor conv_state_indices) {
  constexpr const char* op = "causal_conv1d_update";
  const bool silu = check_update(op, x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices);
  std::vector<int64_t> lengths;
  std::vector<int64_t> slots;
  if (cache_seqlens.has_value()) {
    lengths = index_values(*cache_seqlens);
    for (size_t i = 0; i < lengths.size(); ++i) {
      FASTLM_CHECK_VALUE(lengths[i] >= 0, op, ": cache_seqlens must not be negative, got ", lengths[i], " at index ", i);
    }
  }
  if (conv_state_indices.has_value()) {
    slots = index_values(*conv_state_indices);
    std::vector<bool> taken(static_cast<size_t>(conv_state.size(0)), false);
    for (size_t i = 0; i < slots.size(); ++i) {
      FASTLM_CHECK_INDEX(slots[i] < conv_state.size(0), op, ": conv_state_indices must be below ", conv_state.size(0), ", got ",
                         slots[i], " at index ", i);
      if (slots[i] < 0) continue;
      FASTLM_CHECK_VALUE(!taken[static_cast<size_t>(slots[i])], op, ": conv_state_indices must name each slot at most once, got ",
                         slots[i], " again at index ", i);
      taken[static_cast<size_t>(slots[i])] = true;
    }
  }
  const Tensor out = x.dim() == 2 ? empty({x.size(0), x.size(1)}, x.scalar_type(), x) : empty_like_layout(x, x.scalar_type());
  UpdateParams p{};
  fill_update(p, x, conv_state, weight, bias, out, silu);
  p.cache_seqlens = cache_seqlens.has_value() ? lengths.data() : nullptr;
  p.conv_state_indices = conv_state_indices.has_value() ? slots.data() : nullptr;

  const auto& kernels = FASTLM_CPU_KERNELS(causal_conv1d_update);
  const int k = kernel_index(x.scalar_type());
  parallel_for(op, p.batch * p.dim, grain(8 * p.num_tokens),
               [&](int64_t begin, int64_t end) { kernels.update[k](p, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastlm::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&fastlm::causal_conv1d::forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&fastlm::causal_conv1d::backward));
  m.impl("causal_conv1d_update", TORCH_BOX(&fastlm::causal_conv1d::update));
}
