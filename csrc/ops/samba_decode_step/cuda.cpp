// samba_decode_step on CUDA: checks -> phases -> launches. Values of cache_seqlens are not checked, since that would stop the
// device; the attention clamps them.
#include "adapter/cuda.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "core/cuda/launch.h"
#include "ops/causal_conv1d/fill.h"
#include "ops/samba_decode_step/checks.h"
#include "ops/samba_decode_step/cuda/launch.h"
#include "ops/sliding_window_attention/cuda_update.h"

namespace fastlm::samba_decode_step {
namespace {

using cuda::Product;
using cuda::Use;
using cuda::Weight;

constexpr int64_t kSplitChunks = 2 * cuda::kWarps;  // of x_proj, whose rows alone would keep few blocks busy

bool aligned(int64_t x) { return x % 16 == 0; }
bool aligned(const void* p) { return aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))); }

// An activation: rows of T or acc that begin at multiples of 16 bytes.
struct Rows {
  char* data;
  int64_t stride;
};

class Step {
 public:
  Step(const Sizes& sizes, const Tensor& like)
      : sizes_(sizes), like_(like), bytes_(cuda_bytes(sizes.dtype)), acc_bytes_(bytes_ == 8 ? 8 : 4) {}

  // Fresh rows of `n` elements for every token.
  Rows rows(int64_t n) { return rows(n, sizes_.batch, bytes_); }
  Rows sums(int64_t n, int64_t count) {
    memory_.push_back(empty({count * n}, sizes_.acc, like_));
    return {mutable_data<char>(memory_.back()), n};
  }

  Weight weight(const Tensor& w, void* y, int64_t y_stride) const {
    const bool vector = aligned(w.data_ptr()) && aligned(w.stride(0) * bytes_) && w.size(1) % (16 / bytes_) == 0;
    return {w.data_ptr(), w.stride(0), w.size(0), y, y_stride, vector, 0};
  }
  Weight weight(const Tensor& w, const Rows& y) const { return weight(w, y.data, y.stride); }

  Product product(Use use, int64_t columns, const std::vector<Weight>& weights) const {
    Product p{};
    p.columns = columns;
    p.batch = static_cast<int>(sizes_.batch);
    p.use = use;
    const int64_t chunk = cuda::chunk_columns(bytes_);
    p.chunks = static_cast<int>(ceil_div(columns, chunk));
    p.split_chunks = use == Use::kPartial ? static_cast<int>(kSplitChunks) : std::max(p.chunks, 1);
    p.splits = std::max(1, static_cast<int>(ceil_div(p.chunks, p.split_chunks)));
    for (const Weight& w : weights) {
      p.weights[p.num_weights] = w;
      p.weights[p.num_weights++].first_tile = p.row_tiles;
      if (use != Use::kGate) p.row_tiles += static_cast<int>(ceil_div(w.rows, cuda::kTileRows));
    }
    if (use == Use::kGate) p.row_tiles = static_cast<int>(ceil_div(weights[0].rows, cuda::kTileRows / 2));
    p.group = static_cast<int>(std::min<int64_t>(cuda::max_tokens(bytes_), sizes_.batch));
    return p;
  }

  // x: rows in memory.
  Product& from(Product& p, const Rows& x) const {
    p.x = x.data;
    p.x_stride = x.stride;
    p.x_vector = aligned(x.data) && aligned(x.stride * bytes_) && p.columns % (16 / bytes_) == 0;
    return p;
  }

  // x: `hidden` (B, d) in acc, normalised.
  Product& from(Product& p, const Tensor& hidden, const Tensor& norm, double eps) {
    p.hidden = hidden.data_ptr();
    p.norm = norm.data_ptr();
    p.norm_dtype = param_dtype(norm);
    p.norm_stride = norm.stride(0);
    p.eps = eps;
    const int64_t stride = staged_stride(p.chunks);
    p.staged_stride = static_cast<int>(stride);
    const int64_t fit = fastlm::cuda::current_device().max_shared_bytes - cuda::product_shared_bytes({}, bytes_);
    if (stride * bytes_ > fit) {  // normalised by a launch of its own
      from(p, rows(p.chunks * cuda::chunk_columns(bytes_)));
      p.x_vector = true;  // padded
    } else {
      p.group = static_cast<int>(std::clamp<int64_t>(cuda::kMaxStaged / (stride * bytes_), 1, p.group));
    }
    return p;
  }

  // Elements between tokens of `chunks` chunks in shared memory: tokens read at once begin at different banks.
  int64_t staged_stride(int64_t chunks) const {
    int64_t pieces = chunks * 4 * cuda::kPieces;
    while (pieces % 8 != 4) ++pieces;
    return pieces * (16 / bytes_);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static int64_t cuda_bytes(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

  Rows rows(int64_t n, int64_t count, int64_t bytes) {
    const int64_t stride = ceil_div(n * bytes, 16) * 16 / bytes;
    memory_.push_back(empty({count * stride}, sizes_.dtype, like_));
    return {mutable_data<char>(memory_.back()), stride};
  }

  Sizes sizes_;
  Tensor like_;
  int64_t bytes_, acc_bytes_;
  std::vector<Tensor> memory_;
};

void fill_state(Product& dt, cuda::StateUpdate& p, const Step& step, const Arguments& a, const Sizes& s, const Product& x_proj,
                const Rows& u, const Rows& z, const Rows& y) {
  dt = step.product(Use::kStore, s.rank, {step.weight(a.dt_proj, nullptr, 0)});
  p.low = x_proj.weights[0].y;
  p.splits = x_proj.splits;
  p.state = static_cast<int>(s.state);
  p.u = u.data;
  p.u_stride = u.stride;
  p.z = z.data;
  p.z_stride = z.stride;
  p.y = y.data;
  p.y_stride = y.stride;
  p.A_log = a.A_log.data_ptr();
  p.A_dtype = param_dtype(a.A_log);
  p.A_dim_stride = a.A_log.stride(0);
  p.A_state_stride = a.A_log.stride(1);
  p.D = a.D.data_ptr();
  p.D_dtype = param_dtype(a.D);
  p.D_stride = a.D.stride(0);
  p.bias = a.dt_bias.data_ptr();
  p.bias_dtype = param_dtype(a.dt_bias);
  p.bias_stride = a.dt_bias.stride(0);
  p.h = a.scan_state.data_ptr();
  p.h_dtype = param_dtype(a.scan_state);
  p.h_batch_stride = a.scan_state.stride(0);
  p.h_dim_stride = a.scan_state.stride(1);
  p.h_state_stride = a.scan_state.stride(2);
  p.low_stride = static_cast<int>(step.staged_stride(dt.chunks));
  const int64_t token = p.low_stride * step.bytes() + 2 * s.state * (step.bytes() == 8 ? 8 : 4);
  dt.group = static_cast<int>(std::clamp<int64_t>(cuda::kMaxStaged / token, 1, dt.group));
}

// FASTLM_STEP_LAUNCH=whole asks for one cooperative launch instead of one for every phase. The bits are the same; which of the
// two takes less time has not been measured.
bool one_launch_wanted() {
  const char* wanted = std::getenv("FASTLM_STEP_LAUNCH");
  return wanted != nullptr && std::string(wanted) == "whole";
}

Tensor run(Arguments& a) {
  const Sizes s = check_arguments(a);
  const MambaActivations m = make_mamba(a, s);
  const sliding_window_attention::UpdateInputs inputs = make_attention(a, s);
  const sliding_window_attention::DeviceUpdate attention(kOp, inputs);
  const Tensor out = empty({s.batch, s.width}, s.acc, a.hidden);
  if (s.batch == 0) return out;
  const DeviceGuard guard(a.hidden.get_device_index());
  make_rows_contiguous(a);
  const Tensor hidden = torch::stable::contiguous(a.hidden);

  Step step(s, a.hidden);
  cuda::StepParams p{};
  causal_conv1d::fill_update(p.conv, m.x, a.conv_state, a.conv_weight, a.conv_bias, m.u, true);
  const auto rows_of = [](const Tensor& t) { return Rows{mutable_data<char>(t), t.stride(0)}; };
  const Rows u = rows_of(m.u), z = rows_of(m.z), y = rows_of(m.y);
  const Rows residual{mutable_data<char>(out), s.width};
  Product& in_proj = p.products[cuda::kInProj];
  in_proj = step.product(Use::kConv, s.width, {step.weight(a.in_proj, u)});
  step.from(in_proj, hidden, a.mamba_norm, a.eps);
  in_proj.z = z.data;
  in_proj.z_stride = z.stride;
  in_proj.zeroed = attention.workspace().counters;
  in_proj.num_zeroed = static_cast<int>(attention.num_counters());
  Product& x_proj = p.products[cuda::kXProj];
  x_proj = step.product(Use::kPartial, s.dim, {step.weight(a.x_proj, nullptr, 0)});
  x_proj.weights[0].y = step.sums(s.rank + 2 * s.state, x_proj.splits * s.batch).data;
  step.from(x_proj, u);
  fill_state(p.products[cuda::kSteps], p.state, step, a, s, x_proj, u, z, y);

  const auto add = [&](const Rows& x, const Tensor& weight, const Tensor& base) {
    Product product = step.product(Use::kAdd, weight.size(1), {step.weight(weight, residual)});
    product.base = base.data_ptr();
    return step.from(product, x);
  };
  const auto feed_forward = [&](const Mlp& mlp, Product& gate, Product& down) {
    const Rows inner = step.rows(mlp.w1.size(0));
    gate = step.product(Use::kGate, s.width, {step.weight(mlp.w1, inner), step.weight(mlp.w2, inner)});
    step.from(gate, out, mlp.norm, a.eps);
    down = add(inner, mlp.w3, out);
  };
  p.products[cuda::kOutProj] = add(y, a.out_proj, hidden);
  feed_forward(a.mamba_mlp, p.products[cuda::kMambaGate], p.products[cuda::kMambaDown]);

  const auto heads = [&](const Tensor& t) { return Rows{mutable_data<char>(t), t.size(2) * t.size(3)}; };
  Product& qkv = p.products[cuda::kQkv];
  qkv = step.product(
      Use::kStore, s.width,
      {step.weight(a.q_proj, heads(inputs.q)), step.weight(a.k_proj, heads(inputs.k)), step.weight(a.v_proj, heads(inputs.v))});
  step.from(qkv, out, a.attn_norm, a.eps);
  if (!attention.empty()) p.attn = attention.params();
  p.attn_workspace = attention.workspace();
  p.products[cuda::kOProj] = add(heads(attention.out), a.o_proj, out);
  feed_forward(a.attn_mlp, p.products[cuda::kAttnGate], p.products[cuda::kAttnDown]);

  const DType dtype = static_cast<DType>(kernel_index(s.dtype));
  const cudaStream_t stream = current_stream(a.hidden);
  if (one_launch_wanted() && cuda::whole_applies(p, dtype)) {
    const Tensor counter = empty({1}, ScalarType::Int, a.hidden);
    check_launch(kOp, cuda::launch_whole(p, mutable_data<int32_t>(counter), dtype, stream));
  } else {
    check_launch(kOp, cuda::launch_phases(p, dtype, stream));
  }
  return out;
}

}  // namespace
}  // namespace fastlm::samba_decode_step

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("samba_decode_step", TORCH_BOX(&fastlm::samba_decode_step::step<fastlm::samba_decode_step::run>));
}
