// samba_decode_step on CPU: one token through a Mamba block and a sliding-window block, in one parallel region. The step is a
// list of phases, each as many pieces as there are rows of a weight, channels or heads to share out; threads run from one phase
// into the next without a barrier of the operating system. The mixers run the kernels of their own operators.
#include <algorithm>
#include <functional>
#include <vector>

#include "adapter/check.h"
#include "adapter/pipeline.h"
#include "adapter/tensor.h"
#include "ops/causal_conv1d/checks.h"
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/fill.h"
#include "ops/samba_decode_step/cpu/kernels.h"
#include "ops/selective_scan/call.h"
#include "ops/sliding_window_attention/call.h"

namespace fastlm::samba_decode_step {
namespace {

constexpr const char* kOp = "samba_decode_step";
constexpr int64_t kConvBlock = 256;         // channels a piece of the convolution takes
constexpr int64_t kRowsAlign = 8;           // rows that the kernels take together
constexpr int64_t kLeastBytes = 16 * 1024;  // of weights a piece of a product reads: below, taking it costs more than doing it

// A feed-forward layer and its norm.
struct Mlp {
  Tensor norm, w1, w2, w3;
};

// The step as a list of phases, each needing the one before it. Keeps the memory that they write.
class Step {
 public:
  Step(const Tensor& hidden, ScalarType dtype, double eps)
      : hidden_(hidden), dtype_(dtype), eps_(eps), kernel_(kernel_index(dtype)), batch_(hidden.size(0)), width_(hidden.size(1)) {}

  // A fresh (B, n) activation.
  Tensor activation(int64_t n) const { return empty({batch_, n}, dtype_, hidden_); }

  void then(int64_t pieces, std::function<void(int64_t)> run) {
    pieces_.push_back(pieces);
    runs_.push_back(std::move(run));
  }

  // hidden, normalised.
  Tensor normalize(const Tensor& weight) {
    const Tensor out = activation(width_);
    const Norm p{width_, hidden_.data_ptr(), weight.data_ptr(), param_dtype(weight), weight.stride(0), eps_, out.data_ptr()};
    const auto kernel = FASTLM_CPU_KERNELS(samba_decode_step).normalize[kernel_];
    then(batch_, [p, kernel](int64_t piece) { kernel(p, piece, piece + 1); });
    return out;
  }

  // y = x weight^T for several weights at once.
  void multiply(const Tensor& x, const std::vector<std::pair<Tensor, Tensor>>& weights_and_results) {
    std::vector<Product> products;
    for (const auto& [weight, y] : weights_and_results) products.push_back(product(x, weight, y));
    run_rows(products, FASTLM_CPU_KERNELS(samba_decode_step).store[kernel_]);
  }

  // hidden += x weight^T.
  void add(const Tensor& x, const Tensor& weight) {
    run_rows({product(x, weight, hidden_)}, FASTLM_CPU_KERNELS(samba_decode_step).add[kernel_]);
  }

  // hidden += feed-forward layer of hidden.
  void add_mlp(const Mlp& mlp) {
    const Tensor x = normalize(mlp.norm);
    const Tensor inner = activation(mlp.w1.size(0));
    Product p = product(x, mlp.w1, inner);
    p.gated = mlp.w2.data_ptr();
    p.gated_stride = mlp.w2.stride(0);
    run_rows({p}, FASTLM_CPU_KERNELS(samba_decode_step).gate[kernel_]);
    add(inner, mlp.w3);
  }

  Product product(const Tensor& x, const Tensor& weight, const Tensor& y) {
    for (const Tensor& t : {x, weight, y}) memory_.push_back(t);
    return {batch_, weight.size(1), weight.size(0), x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), nullptr,
            0,      y.data_ptr(),   y.stride(0)};
  }

  void run() const {
    run_pipeline(
        kOp, static_cast<int64_t>(runs_.size()), [&](int64_t i) { return Phase{pieces_[static_cast<size_t>(i)], i - 1}; },
        [&](int64_t i, int64_t piece) { runs_[static_cast<size_t>(i)](piece); });
  }

 private:
  void run_rows(std::vector<Product> products, Multiply kernel) {
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<int64_t> rows, first{0};  // of a piece; pieces before each product
    for (const Product& p : products) {
      const int64_t bytes = std::max<int64_t>(1, p.in * (dtype_ == ScalarType::Double ? 8 : dtype_ == ScalarType::Float ? 4 : 2));
      const int64_t share = ceil_div(p.out, 4 * threads * static_cast<int64_t>(products.size()));
      rows.push_back(ceil_div(std::max(share, ceil_div(kLeastBytes, bytes)), kRowsAlign) * kRowsAlign);
      first.push_back(first.back() + ceil_div(p.out, rows.back()));
    }
    const int64_t pieces = first.back();
    then(pieces, [products = std::move(products), rows, first, kernel](int64_t piece) {
      size_t i = 0;
      while (piece >= first[i + 1]) ++i;
      const int64_t begin = (piece - first[i]) * rows[i];
      kernel(products[i], begin, std::min(begin + rows[i], products[i].out));
    });
  }

  Tensor hidden_;
  ScalarType dtype_;
  double eps_;
  int kernel_;
  int64_t batch_, width_;
  std::vector<int64_t> pieces_;
  std::vector<std::function<void(int64_t)>> runs_;
  std::vector<Tensor> memory_;
};

Tensor columns(const Tensor& t, int64_t begin, int64_t end) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, begin, end - begin);
}

Tensor unit_inner(const Tensor& t) { return sliding_window_attention::unit_inner_stride(t); }

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

Tensor step(Tensor hidden, Tensor mamba_norm, Tensor in_proj, Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj,
            Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, Tensor mamba_mlp_norm, Tensor mamba_w1,
            Tensor mamba_w2, Tensor mamba_w3, Tensor conv_state, Tensor scan_state, Tensor attn_norm, Tensor q_proj,
            Tensor k_proj, Tensor v_proj, Tensor o_proj, Tensor attn_mlp_norm, Tensor attn_w1, Tensor attn_w2, Tensor attn_w3,
            Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, std::vector<int64_t> window_size, double eps,
            std::optional<double> softmax_scale, OptionalTensor rotary_cos, OptionalTensor rotary_sin) {
  check_floating(kOp, "in_proj", in_proj);
  const ScalarType dtype = in_proj.scalar_type(), acc = accumulation_dtype(dtype);
  check_dim(kOp, "hidden", hidden, 2, "(B, d)");
  FASTLM_CHECK_VALUE(hidden.scalar_type() == acc, kOp, ": hidden must have dtype ", dtype_name(acc), " (that of sums), got ",
                     dtype_name(hidden.scalar_type()));
  const int64_t batch = hidden.size(0), width = hidden.size(1);
  check_dim(kOp, "A_log", A_log, 2, "(D, N)");
  check_floating(kOp, "A_log", A_log);
  check_same_device(kOp, "A_log", A_log, "hidden", hidden);
  const int64_t dim = A_log.size(0), state = A_log.size(1);
  check_same_device(kOp, "in_proj", in_proj, "hidden", hidden);
  check_parameter("mamba_norm", mamba_norm, width, hidden);
  check_shape(kOp, "in_proj", in_proj, {2 * dim, width});
  check_dim(kOp, "dt_proj", dt_proj, 2, "(D, R)");
  const int64_t rank = dt_proj.size(1);
  check_weight("x_proj", x_proj, {rank + 2 * state, dim}, in_proj);
  check_weight("dt_proj", dt_proj, {dim, rank}, in_proj);
  check_weight("out_proj", out_proj, {width, dim}, in_proj);
  const Mlp mamba_mlp{mamba_mlp_norm, unit_inner(mamba_w1), unit_inner(mamba_w2), unit_inner(mamba_w3)};
  check_mlp({"mamba_mlp_norm", "mamba_w1", "mamba_w2", "mamba_w3"}, mamba_mlp, width, in_proj);
  check_parameter("attn_norm", attn_norm, width, hidden);
  check_dim(kOp, "k_cache", k_cache, 4, "(B, R, Hkv, K)");
  const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  check_dim(kOp, "q_proj", q_proj, 2, "(H K, d)");
  FASTLM_CHECK_VALUE(head_dim > 0 && q_proj.size(0) % head_dim == 0, kOp, ": q_proj must have a multiple of ", head_dim,
                     " rows (the head dim of k_cache), got ", q_proj.size(0));
  const int64_t heads = q_proj.size(0) / head_dim;
  check_weight("q_proj", q_proj, {heads * head_dim, width}, in_proj);
  check_weight("k_proj", k_proj, {kv_heads * head_dim, width}, in_proj);
  check_weight("v_proj", v_proj, {kv_heads * head_dim, width}, in_proj);
  check_weight("o_proj", o_proj, {width, heads * head_dim}, in_proj);
  const Mlp attn_mlp{attn_mlp_norm, unit_inner(attn_w1), unit_inner(attn_w2), unit_inner(attn_w3)};
  check_mlp({"attn_mlp_norm", "attn_w1", "attn_w2", "attn_w3"}, attn_mlp, width, in_proj);
  FASTLM_CHECK_VALUE(eps >= 0, kOp, ": eps must not be negative, got ", eps);

  const Tensor out = torch::stable::clone(torch::stable::contiguous(hidden));
  Step step(out, dtype, eps);
  const int k = kernel_index(dtype);

  // Mamba block
  const Tensor xz = step.activation(2 * dim), u = step.activation(dim), low = step.activation(rank + 2 * state);
  const Tensor dt = step.activation(dim), y = step.activation(dim);
  const Tensor x = columns(xz, 0, dim), z = columns(xz, dim, 2 * dim);
  causal_conv1d::check_update(kOp, x, conv_state, conv_weight, conv_bias, std::string("silu"), std::nullopt, std::nullopt);
  causal_conv1d::UpdateParams conv{};
  causal_conv1d::fill_update(conv, x, conv_state, conv_weight, conv_bias, u, true);
  const Tensor A = empty({dim, state}, acc, hidden);
  const Decay decay{dim, state, A_log.data_ptr(), param_dtype(A_log), A_log.stride(0), A_log.stride(1), A.data_ptr()};
  const selective_scan::UpdateInputs inputs{
      scan_state, u, dt, A, columns(low, rank, rank + state), columns(low, rank + state, rank + 2 * state), D, z, dt_bias, true};
  selective_scan::check_update(kOp, inputs.state, inputs.x, inputs.dt, A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias,
                               std::nullopt);
  selective_scan::UpdateParams scan{};
  selective_scan::fill_update(scan, inputs, y);
  // Attention block
  const Tensor q = empty({batch, 1, heads, head_dim}, dtype, hidden);
  const Tensor key = empty({batch, 1, kv_heads, head_dim}, dtype, hidden),
               value = empty({batch, 1, kv_heads, head_dim}, dtype, hidden);
  const sliding_window_attention::Update attention(
      kOp, {q, key, value, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, rotary_cos, rotary_sin});
  if (batch == 0) return out;
  const auto flat = [&](const Tensor& t) { return torch::stable::reshape(t, {batch, t.size(2) * t.size(3)}); };

  step.multiply(step.normalize(mamba_norm), {{unit_inner(in_proj), xz}});
  const auto update_conv = FASTLM_CPU_KERNELS(causal_conv1d_update).update[k];
  step.then(ceil_div(batch * dim, kConvBlock),
            [&](int64_t piece) { update_conv(conv, piece * kConvBlock, std::min((piece + 1) * kConvBlock, batch * dim)); });
  step.multiply(u, {{unit_inner(x_proj), low}});
  // Decays and step sizes of a block of channels, and at once its states.
  const Tensor dt_weight = unit_inner(dt_proj);
  const Product steps = step.product(low, dt_weight, dt);
  const auto multiply = FASTLM_CPU_KERNELS(samba_decode_step).store[k];
  const auto form_decay = FASTLM_CPU_KERNELS(samba_decode_step).decay[k];
  const auto update_state = FASTLM_CPU_KERNELS(selective_scan_update).update[k];
  const int64_t blocks = ceil_div(dim, selective_scan::kUpdateBlock);
  step.then(blocks, [&](int64_t block) {
    const int64_t begin = block * selective_scan::kUpdateBlock, end = std::min(begin + selective_scan::kUpdateBlock, dim);
    form_decay(decay, begin, end);
    multiply(steps, begin, end);
    for (int64_t row = 0; row < batch; ++row) update_state(scan, row * blocks + block, row * blocks + block + 1);
  });
  step.add(y, unit_inner(out_proj));
  step.add_mlp(mamba_mlp);

  step.multiply(step.normalize(attn_norm),
                {{unit_inner(q_proj), flat(q)}, {unit_inner(k_proj), flat(key)}, {unit_inner(v_proj), flat(value)}});
  using Attention = sliding_window_attention::Update;
  for (const Attention::Phase phase : {Attention::kWrite, Attention::kAttend, Attention::kMerge}) {
    step.then(attention.pieces(phase), [&attention, phase](int64_t piece) { attention.run(phase, piece, piece + 1); });
  }
  step.add(flat(attention.out), unit_inner(o_proj));
  step.add_mlp(attn_mlp);
  step.run();
  return out;
}

}  // namespace
}  // namespace fastlm::samba_decode_step

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("samba_decode_step", TORCH_BOX(&fastlm::samba_decode_step::step)); }
