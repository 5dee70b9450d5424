// Arguments of samba_decode_step, their checks and what both twins set up before their kernels.
#pragma once

#include <optional>
#include <vector>

#include "adapter/check.h"
#include "ops/sliding_window_attention/call.h"

namespace fastlm::samba_decode_step {

constexpr const char* kOp = "samba_decode_step";

// A feed-forward layer and its norm.
struct Mlp {
  Tensor norm, w1, w2, w3;
};

struct Arguments {
  Tensor hidden;
  Tensor mamba_norm, in_proj, conv_weight;
  OptionalTensor conv_bias;
  Tensor x_proj, dt_proj, dt_bias, A_log, D, out_proj;
  Mlp mamba_mlp;
  Tensor conv_state, scan_state;
  Tensor attn_norm, q_proj, k_proj, v_proj, o_proj;
  Mlp attn_mlp;
  Tensor k_cache, v_cache, cache_seqlens;
  std::vector<int64_t> window_size;
  double eps;
  std::optional<double> softmax_scale;
  OptionalTensor rotary_cos, rotary_sin;
};

struct Sizes {
  ScalarType dtype, acc;              // of weights and activations; of sums and the residual stream
  int64_t batch, width;               // B, d
  int64_t dim, state, rank;           // D, N, R
  int64_t heads, kv_heads, head_dim;  // H, Hkv, K
};

// Activations of the Mamba block, (B, n): x and z are the halves of xz, B and C the ends of low.
struct MambaActivations {
  Tensor xz, x, z, u, low, B, C, dt, y;
};

// The operator as it is registered; kRun gets its arguments with every weight at unit stride over its last dimension.
template <Tensor (*kRun)(Arguments& arguments)>
Tensor step(Tensor hidden, Tensor mamba_norm, Tensor in_proj, Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj,
            Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, Tensor mamba_mlp_norm, Tensor mamba_w1,
            Tensor mamba_w2, Tensor mamba_w3, Tensor conv_state, Tensor scan_state, Tensor attn_norm, Tensor q_proj,
            Tensor k_proj, Tensor v_proj, Tensor o_proj, Tensor attn_mlp_norm, Tensor attn_w1, Tensor attn_w2, Tensor attn_w3,
            Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, std::vector<int64_t> window_size, double eps,
            std::optional<double> softmax_scale, OptionalTensor rotary_cos, OptionalTensor rotary_sin) {
  Arguments arguments{hidden,        mamba_norm,
                      in_proj,       conv_weight,
                      conv_bias,     x_proj,
                      dt_proj,       dt_bias,
                      A_log,         D,
                      out_proj,      {mamba_mlp_norm, mamba_w1, mamba_w2, mamba_w3},
                      conv_state,    scan_state,
                      attn_norm,     q_proj,
                      k_proj,        v_proj,
                      o_proj,        {attn_mlp_norm, attn_w1, attn_w2, attn_w3},
                      k_cache,       v_cache,
                      cache_seqlens, window_size,
                      eps,           softmax_scale,
                      rotary_cos,    rotary_sin};
  return kRun(arguments);
}

// Checks everything but what make_mamba and the attention check.
Sizes check_arguments(const Arguments& arguments);

// Replaces weights whose rows are not contiguous by copies.
void make_rows_contiguous(Arguments& arguments);

// Fresh activations; checks the arguments of the convolution and the state update.
MambaActivations make_mamba(const Arguments& arguments, const Sizes& sizes);

// The arguments of the attention, with fresh q, k and v; whoever sets it up checks them.
sliding_window_attention::UpdateInputs make_attention(const Arguments& arguments, const Sizes& sizes);

Tensor columns(const Tensor& t, int64_t begin, int64_t end);

}  // namespace fastlm::samba_decode_step
