// samba_decode_step on CPU: one token through a Mamba block and a sliding-window block, in one parallel region. The step is a
// list of phases, each as many pieces as there are rows of a weight, channels or heads to share out; threads run from one phase
// into the next without a barrier of the operating system. The mixers run the kernels of their own operators.
#include <algorithm>
#include <functional>
#include <vector>

#include "adapter/pipeline.h"
#include "adapter/tensor.h"
#include "ops/causal_conv1d/cpu/kernels.h"
#include "ops/causal_conv1d/fill.h"
#include "ops/samba_decode_step/checks.h"
#include "ops/samba_decode_step/cpu/kernels.h"
#include "ops/selective_scan/call.h"

namespace fastlm::samba_decode_step {
namespace {

constexpr int64_t kConvBlock = 256;         // channels a piece of the convolution takes
constexpr int64_t kRowsAlign = 8;           // rows that the kernels take together
constexpr int64_t kLeastBytes = 16 * 1024;  // of weights a piece of a product reads: below, taking it costs more than doing it

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

Tensor run(Arguments& a) {
  const Sizes s = check_arguments(a);
  make_rows_contiguous(a);
  const int64_t batch = s.batch, dim = s.dim, state = s.state;
  const MambaActivations m = make_mamba(a, s);
  const sliding_window_attention::UpdateInputs inputs = make_attention(a, s);
  const sliding_window_attention::Update attention(kOp, inputs);
  const Tensor out = torch::stable::clone(torch::stable::contiguous(a.hidden));
  if (batch == 0) return out;
  Step step(out, s.dtype, a.eps);
  const int k = kernel_index(s.dtype);

  // Mamba block
  causal_conv1d::UpdateParams conv{};
  causal_conv1d::fill_update(conv, m.x, a.conv_state, a.conv_weight, a.conv_bias, m.u, true);
  const Tensor A = empty({dim, state}, s.acc, a.hidden);
  const Decay decay{dim, state, a.A_log.data_ptr(), param_dtype(a.A_log), a.A_log.stride(0), a.A_log.stride(1), A.data_ptr()};
  selective_scan::UpdateParams scan{};
  selective_scan::fill_update(scan, {a.scan_state, m.u, m.dt, A, m.B, m.C, a.D, m.z, a.dt_bias, true}, m.y);

  step.multiply(step.normalize(a.mamba_norm), {{a.in_proj, m.xz}});
  const auto update_conv = FASTLM_CPU_KERNELS(causal_conv1d_update).update[k];
  step.then(ceil_div(batch * dim, kConvBlock),
            [&](int64_t piece) { update_conv(conv, piece * kConvBlock, std::min((piece + 1) * kConvBlock, batch * dim)); });
  step.multiply(m.u, {{a.x_proj, m.low}});
  // Decays and step sizes of a block of channels, and at once its states.
  const Product steps = step.product(m.low, a.dt_proj, m.dt);
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
  step.add(m.y, a.out_proj);
  step.add_mlp(a.mamba_mlp);

  // Attention block
  const auto flat = [&](const Tensor& t) { return torch::stable::reshape(t, {batch, t.size(2) * t.size(3)}); };
  step.multiply(step.normalize(a.attn_norm),
                {{a.q_proj, flat(inputs.q)}, {a.k_proj, flat(inputs.k)}, {a.v_proj, flat(inputs.v)}});
  using Attention = sliding_window_attention::Update;
  for (const Attention::Phase phase : {Attention::kWrite, Attention::kAttend, Attention::kMerge}) {
    step.then(attention.pieces(phase), [&attention, phase](int64_t piece) { attention.run(phase, piece, piece + 1); });
  }
  step.add(flat(attention.out), a.o_proj);
  step.add_mlp(a.attn_mlp);
  step.run();
  return out;
}

}  // namespace
}  // namespace fastlm::samba_decode_step

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("samba_decode_step", TORCH_BOX(&fastlm::samba_decode_step::step<fastlm::samba_decode_step::run>));
}
