// Argument checks of samba_decode_step.
#include "ops/samba_decode_step/checks.h"

#include "ops/causal_conv1d/checks.h"
#include "ops/selective_scan/checks.h"

namespace fastlm::samba_decode_step {
namespace {

void check_weight(const char* name, const Tensor& t, const std::vector<int64_t>& shape, const Tensor& like) {
  check_shape(kOp, name, t, shape);
  check_same_dtype(kOp, name, t, "in_proj", like);
  check_same_device(kOp, name, t, "hidden", like);
}

void check_parameter(const char* name, const Tensor& t, int64_t n, const Tensor& like) {
  check_floating(kOp, name, t);
  check_shape(kOp, name, t, {n});
  check_same_device(kOp, name, t, "hidden", like);
}

void check_mlp(const char* const (&names)[4], const Mlp& mlp, int64_t width, const Tensor& like) {
  check_parameter(names[0], mlp.norm, width, like);
  check_dim(kOp, names[1], mlp.w1, 2, "(f, d)");
  const int64_t inner = mlp.w1.size(0);
  check_weight(names[1], mlp.w1, {inner, width}, like);
  check_weight(names[2], mlp.w2, {inner, width}, like);
  check_weight(names[3], mlp.w3, {width, inner}, like);
}

}  // namespace

Tensor columns(const Tensor& t, int64_t begin, int64_t end) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, begin, end - begin);
}

Sizes check_arguments(const Arguments& a) {
  check_floating(kOp, "in_proj", a.in_proj);
  Sizes s{};
  s.dtype = a.in_proj.scalar_type();
  s.acc = accumulation_dtype(s.dtype);
  check_dim(kOp, "hidden", a.hidden, 2, "(B, d)");
  FASTLM_CHECK_VALUE(a.hidden.scalar_type() == s.acc, kOp, ": hidden must have dtype ", dtype_name(s.acc),
                     " (that of sums), got ", dtype_name(a.hidden.scalar_type()));
  s.batch = a.hidden.size(0);
  s.width = a.hidden.size(1);
  check_dim(kOp, "A_log", a.A_log, 2, "(D, N)");
  check_floating(kOp, "A_log", a.A_log);
  check_same_device(kOp, "A_log", a.A_log, "hidden", a.hidden);
  s.dim = a.A_log.size(0);
  s.state = a.A_log.size(1);
  check_same_device(kOp, "in_proj", a.in_proj, "hidden", a.hidden);
  check_parameter("mamba_norm", a.mamba_norm, s.width, a.hidden);
  check_shape(kOp, "in_proj", a.in_proj, {2 * s.dim, s.width});
  check_dim(kOp, "dt_proj", a.dt_proj, 2, "(D, R)");
  s.rank = a.dt_proj.size(1);
  check_weight("x_proj", a.x_proj, {s.rank + 2 * s.state, s.dim}, a.in_proj);
  check_weight("dt_proj", a.dt_proj, {s.dim, s.rank}, a.in_proj);
  check_weight("out_proj", a.out_proj, {s.width, s.dim}, a.in_proj);
  check_mlp({"mamba_mlp_norm", "mamba_w1", "mamba_w2", "mamba_w3"}, a.mamba_mlp, s.width, a.in_proj);
  check_parameter("attn_norm", a.attn_norm, s.width, a.hidden);
  check_dim(kOp, "k_cache", a.k_cache, 4, "(B, R, Hkv, K)");
  s.kv_heads = a.k_cache.size(2);
  s.head_dim = a.k_cache.size(3);
  check_dim(kOp, "q_proj", a.q_proj, 2, "(H K, d)");
  FASTLM_CHECK_VALUE(s.head_dim > 0 && a.q_proj.size(0) % s.head_dim == 0, kOp, ": q_proj must have a multiple of ", s.head_dim,
                     " rows (the head dim of k_cache), got ", a.q_proj.size(0));
  s.heads = a.q_proj.size(0) / s.head_dim;
  check_weight("q_proj", a.q_proj, {s.heads * s.head_dim, s.width}, a.in_proj);
  check_weight("k_proj", a.k_proj, {s.kv_heads * s.head_dim, s.width}, a.in_proj);
  check_weight("v_proj", a.v_proj, {s.kv_heads * s.head_dim, s.width}, a.in_proj);
  check_weight("o_proj", a.o_proj, {s.width, s.heads * s.head_dim}, a.in_proj);
  check_mlp({"attn_mlp_norm", "attn_w1", "attn_w2", "attn_w3"}, a.attn_mlp, s.width, a.in_proj);
  FASTLM_CHECK_VALUE(a.eps >= 0, kOp, ": eps must not be negative, got ", a.eps);
  return s;
}

void make_rows_contiguous(Arguments& a) {
  for (Tensor* t : {&a.in_proj, &a.x_proj, &a.dt_proj, &a.out_proj, &a.mamba_mlp.w1, &a.mamba_mlp.w2, &a.mamba_mlp.w3, &a.q_proj,
                    &a.k_proj, &a.v_proj, &a.o_proj, &a.attn_mlp.w1, &a.attn_mlp.w2, &a.attn_mlp.w3}) {
    *t = sliding_window_attention::unit_inner_stride(*t);
  }
}

MambaActivations make_mamba(const Arguments& a, const Sizes& s) {
  const auto activation = [&](int64_t n) { return empty({s.batch, n}, s.dtype, a.hidden); };
  MambaActivations m{
      activation(2 * s.dim), {}, {}, activation(s.dim), activation(s.rank + 2 * s.state), {}, {}, activation(s.dim),
      activation(s.dim)};
  m.x = columns(m.xz, 0, s.dim);
  m.z = columns(m.xz, s.dim, 2 * s.dim);
  m.B = columns(m.low, s.rank, s.rank + s.state);
  m.C = columns(m.low, s.rank + s.state, s.rank + 2 * s.state);
  causal_conv1d::check_update(kOp, m.x, a.conv_state, a.conv_weight, a.conv_bias, std::string("silu"), std::nullopt,
                              std::nullopt);
  selective_scan::check_update(kOp, a.scan_state, m.u, m.dt, a.A_log, m.B, m.C, a.D, m.z, a.dt_bias, std::nullopt);
  return m;
}

sliding_window_attention::UpdateInputs make_attention(const Arguments& a, const Sizes& s) {
  const auto heads = [&](int64_t n) { return empty({s.batch, 1, n, s.head_dim}, s.dtype, a.hidden); };
  return {heads(s.heads),  heads(s.kv_heads), heads(s.kv_heads), a.k_cache,    a.v_cache,
          a.cache_seqlens, a.window_size,     a.softmax_scale,   a.rotary_cos, a.rotary_sin};
}

}  // namespace fastlm::samba_decode_step
