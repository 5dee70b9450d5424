// Argument checks of selective_scan.
#include "ops/selective_scan/checks.h"

namespace fastlm::selective_scan {
namespace {

// (D, N) with 1 <= N <= kMaxState; returns N.
int64_t check_decay(const char* op, const Tensor& A, const char* main, const Tensor& like, int64_t dim) {
  check_floating(op, "A", A);
  check_dim(op, "A", A, 2, "(D, N)");
  FASTLM_CHECK_VALUE(A.size(0) == dim, op, ": A must have shape (", dim, ", N), got ", shape_string(A));
  FASTLM_CHECK_VALUE(A.size(1) >= 1 && A.size(1) <= kMaxState, op, ": A must have a state size between 1 and ", kMaxState,
                     ", got ", A.size(1));
  check_same_device(op, "A", A, main, like);
  return A.size(1);
}

void check_groups(const char* op, const char* name, const Tensor& t, int64_t dim) {
  FASTLM_CHECK_VALUE(t.size(1) >= 1 && dim % t.size(1) == 0, op, ": ", name, " must have a number of groups that divides ", dim,
                     ", got ", t.size(1));
}

void check_projection(const char* op, const char* name, const Tensor& t, const Tensor& u, int64_t state) {
  FASTLM_CHECK_VALUE(t.dim() >= 2 && t.dim() <= 4, op, ": ", name, " must have shape (B, N, L), (B, G, N, L) or (D, N), got ",
                     shape_string(t));
  if (t.dim() == 2) {
    check_floating(op, name, t);
    check_shape(op, name, t, {u.size(1), state});
  } else {
    check_same_dtype(op, name, t, "u", u);
    if (t.dim() == 4) check_groups(op, name, t, u.size(1));
    const int64_t batch = u.size(0), length = u.size(2);
    if (t.dim() == 3) {
      check_shape(op, name, t, {batch, state, length});
    } else {
      check_shape(op, name, t, {batch, t.size(1), state, length});
    }
  }
  check_same_device(op, name, t, "u", u);
}

void check_like(const char* op, const char* name, const Tensor& t, const char* main, const Tensor& like) {
  const auto sizes = like.sizes();
  check_shape(op, name, t, std::vector<int64_t>(sizes.begin(), sizes.end()));
  check_same_dtype(op, name, t, main, like);
  check_same_device(op, name, t, main, like);
}

void check_vector(const char* op, const char* name, const OptionalTensor& t, const char* main, const Tensor& like) {
  if (!t.has_value()) return;
  check_floating(op, name, *t);
  check_shape(op, name, *t, {like.size(1)});
  check_same_device(op, name, *t, main, like);
}

}  // namespace

int64_t num_states(const Tensor& u, const OptionalTensor& cu_seqlens) {
  return cu_seqlens.has_value() ? max_of(cu_seqlens->size(0) - 1, 0) : u.size(0);
}

ScalarType accumulation_type(const Tensor& u) {
  return u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_forward(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  check_floating(op, "u", u);
  check_dim(op, "u", u, 3, "(B, D, L)");
  check_like(op, "delta", delta, "u", u);
  const int64_t state = check_decay(op, A, "u", u, u.size(1));
  check_projection(op, "B", B, u, state);
  check_projection(op, "C", C, u, state);
  check_vector(op, "D", D, "u", u);
  if (z.has_value()) check_like(op, "z", *z, "u", u);
  check_vector(op, "delta_bias", delta_bias, "u", u);
  if (cu_seqlens.has_value()) {
    check_cu_seqlens_shape(op, "cu_seqlens", *cu_seqlens, u.size(2));
    FASTLM_CHECK_VALUE(u.size(0) == 1, op, ": u must have batch 1 when cu_seqlens is given, got ", u.size(0));
    check_same_device(op, "cu_seqlens", *cu_seqlens, "u", u);
  }
  if (initial_state.has_value()) {
    check_floating(op, "initial_state", *initial_state);
    check_shape(op, "initial_state", *initial_state, {num_states(u, cu_seqlens), u.size(1), state});
    check_same_device(op, "initial_state", *initial_state, "u", u);
  }
}

void check_backward(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& A,
                    const Tensor& chunk_states, const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "selective_scan_backward";
  check_like(op, "dout", dout, "u", u);
  const auto check_accumulated = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
    check_shape(op, name, t, shape);
    FASTLM_CHECK_VALUE(t.scalar_type() == accumulation_type(u), op, ": ", name, " must have dtype ",
                       dtype_name(accumulation_type(u)), ", got ", dtype_name(t.scalar_type()));
    check_same_device(op, name, t, "u", u);
  };
  if (dlast_state.has_value()) {
    check_accumulated("dlast_state", *dlast_state, {num_states(u, cu_seqlens), u.size(1), A.size(1)});
  }
  check_accumulated("chunk_states", chunk_states, {u.size(0), u.size(2) / kChunk, A.size(1), u.size(1)});
}

void check_update(const char* op, const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                  const OptionalTensor& state_batch_indices) {
  check_floating(op, "x", x);
  check_dim(op, "x", x, 2, "(B, D)");
  check_like(op, "dt", dt, "x", x);
  const int64_t n = check_decay(op, A, "x", x, x.size(1));
  check_floating(op, "state", state);
  check_dim(op, "state", state, 3, "(B, D, N)");
  if (x.scalar_type() == ScalarType::Double) {
    check_same_dtype(op, "state", state, "x", x);
  } else {
    FASTLM_CHECK_VALUE(state.scalar_type() != ScalarType::Double, op,
                       ": state must have dtype float32, bfloat16 or float16, got float64");
  }
  check_same_device(op, "state", state, "x", x);
  if (state_batch_indices.has_value()) {
    check_shape(op, "state", state, {state.size(0), x.size(1), n});
    check_index_vector(op, "state_batch_indices", *state_batch_indices);
    check_shape(op, "state_batch_indices", *state_batch_indices, {x.size(0)});
    check_same_device(op, "state_batch_indices", *state_batch_indices, "x", x);
  } else {
    check_shape(op, "state", state, {x.size(0), x.size(1), n});
  }
  for (int64_t i = 0; i < 3; ++i) {
    FASTLM_CHECK_VALUE(state.stride(i) != 0 || state.size(i) <= 1, op,
                       ": state must not repeat memory, got stride 0 in dimension ", i);
  }
  const auto check_matrix = [&](const char* name, const Tensor& t) {
    FASTLM_CHECK_VALUE(t.dim() == 2 || t.dim() == 3, op, ": ", name, " must have shape (B, N) or (B, G, N), got ",
                       shape_string(t));
    check_same_dtype(op, name, t, "x", x);
    if (t.dim() == 2) {
      check_shape(op, name, t, {x.size(0), n});
    } else {
      check_groups(op, name, t, x.size(1));
      check_shape(op, name, t, {x.size(0), t.size(1), n});
    }
    check_same_device(op, name, t, "x", x);
  };
  check_matrix("B", B);
  check_matrix("C", C);
  check_vector(op, "D", D, "x", x);
  if (z.has_value()) check_like(op, "z", *z, "x", x);
  check_vector(op, "dt_bias", dt_bias, "x", x);
}

std::vector<Sequence> make_sequences(const char* op, const Tensor& u, const OptionalTensor& cu_seqlens) {
  std::vector<Sequence> sequences;
  const int64_t length = u.size(2);
  const int64_t chunks = length / kChunk;  // of a row
  if (!cu_seqlens.has_value()) {
    for (int64_t b = 0; b < u.size(0); ++b) sequences.push_back({b, 0, length, b * chunks, (b + 1) * chunks});
    return sequences;
  }
  // A sequence fills floor(length / kChunk) chunks, which always fit between floor(begin / kChunk) and floor(end / kChunk).
  const std::vector<int64_t> bounds = check_cu_seqlens(op, "cu_seqlens", *cu_seqlens, length);
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    sequences.push_back({0, bounds[i], bounds[i + 1], bounds[i] / kChunk, bounds[i + 1] / kChunk});
  }
  return sequences;
}

std::vector<int64_t> check_slots(const Tensor& state, const Tensor& state_batch_indices) {
  constexpr const char* op = "selective_state_update";
  std::vector<int64_t> slots = index_values(state_batch_indices);
  std::vector<bool> taken(static_cast<size_t>(state.size(0)), false);
  for (size_t i = 0; i < slots.size(); ++i) {
    FASTLM_CHECK_INDEX(slots[i] < state.size(0), op, ": state_batch_indices must be below ", state.size(0), ", got ", slots[i],
                       " at index ", i);
    if (slots[i] < 0) continue;
    FASTLM_CHECK_VALUE(!taken[static_cast<size_t>(slots[i])], op, ": state_batch_indices must name each slot at most once, got ",
                       slots[i], " again at index ", i);
    taken[static_cast<size_t>(slots[i])] = true;
  }
  return slots;
}

}  // namespace fastlm::selective_scan
