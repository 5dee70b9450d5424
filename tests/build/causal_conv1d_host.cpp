// The CUDA kernels of causal_conv1d run thread by thread on the host, behind C functions that ctypes calls (float32 only).
#include "core/cuda/host_emulation.h"

#include "ops/causal_conv1d/cuda/backward.cuh"
#include "ops/causal_conv1d/cuda/forward.cuh"
#include "ops/causal_conv1d/cuda/update.cuh"

#include <vector>

namespace conv = fastlm::causal_conv1d;
namespace kernels = fastlm::causal_conv1d::cuda;
using fastlm::cuda::for_each_thread;

namespace {

// Flat description of a call, as Python fills it: every tensor is contiguous in (B, D, L) or (B, L, D) order.
struct Call {
  int64_t batch, dim, seqlen, width, num_states;
  int32_t silu, channel_last;
  const float *x, *weight, *bias, *initial;
  const int32_t *cu_seqlens, *seq_idx;
};

void fill(conv::Params& p, const Call& c) {
  p.batch = c.batch;
  p.dim = c.dim;
  p.seqlen = c.seqlen;
  p.width = c.width;
  p.silu = c.silu != 0;
  p.x = c.x;
  p.x_batch_stride = c.dim * c.seqlen;
  p.x_dim_stride = c.channel_last ? 1 : c.seqlen;
  p.x_seq_stride = c.channel_last ? c.dim : 1;
  p.out_batch_stride = p.x_batch_stride;
  p.out_dim_stride = p.x_dim_stride;
  p.out_seq_stride = p.x_seq_stride;
  p.weight = c.weight;
  p.weight_dim_stride = c.width;
  p.weight_width_stride = 1;
  p.bias = c.bias;
  p.bias_stride = 1;
  p.initial_states = c.initial;
  p.initial_batch_stride = c.dim * (c.width - 1);
  p.initial_dim_stride = c.width - 1;
  p.initial_width_stride = 1;
  p.device.cu_seqlens = c.cu_seqlens;
  p.device.num_sequences = c.cu_seqlens ? c.num_states : 0;
  p.device.seq_idx = c.seq_idx;
  p.device.seq_idx_batch_stride = c.seqlen;
  p.device.seq_idx_seq_stride = 1;
}

unsigned int pieces(int64_t n, int64_t size) { return static_cast<unsigned int>((n + size - 1) / size); }

// A grid smaller than the problem in y and z, so that the strided loops are exercised too.
unsigned int fewer(unsigned int n) { return n > 2 ? n - 1 : n; }

template <int kWidth>
void run_forward(const conv::Params& p, bool channel_last) {
  const auto batch = static_cast<unsigned int>(p.batch);
  if (channel_last) {
    const dim3 grid(pieces(p.dim, kernels::kThreads), fewer(pieces(p.seqlen, kernels::kStepsRows)), fewer(batch));
    for_each_thread(grid, kernels::kThreads, [&] { kernels::forward_rows<float, kWidth>(p); });
  } else {
    const dim3 grid(pieces(p.seqlen, kernels::kThreads * kernels::kStepsChannels), fewer(static_cast<unsigned int>(p.dim)),
                    fewer(batch));
    for_each_thread(grid, kernels::kThreads, [&] { kernels::forward_channels<float, kWidth>(p); });
  }
}

// The kernels' work without the sum over a block's threads: pieces in order, weight gradients added up here.
template <int kWidth>
void run_backward(const conv::BackwardParams& p, bool channel_last, float* dweight, float* dbias) {
  const int64_t step = channel_last ? kernels::kStepsRows : kernels::kStepsChannels;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int64_t t = 0; t < p.seqlen; t += step) {
        float dw[kernels::Window<float, kWidth>::kSize + 1] = {};
        kernels::backward_piece<float, kWidth>(p, b, d, t, std::min(t + step, p.seqlen), dw);
        for (int64_t j = 0; j < p.width; ++j) dweight[d * p.width + j] += dw[j];
        dbias[d] += dw[p.width];
      }
    }
  }
}

}  // namespace

extern "C" {

void forward(const Call* c, float* out, float* final_states) {
  conv::Params p{};
  fill(p, *c);
  p.out = out;
  p.final_states = final_states;
  if (p.batch * p.dim * p.seqlen > 0) {
    if (p.width == 4) {
      run_forward<4>(p, c->channel_last);
    } else {
      run_forward<0>(p, c->channel_last);
    }
  }
  if (p.width > 1) for_each_thread(dim3(3), 5, [&] { kernels::final_states<float>(p, c->num_states); });
}

void backward(const Call* c, const float* dout, const float* dfinal, float* dx, float* dweight, float* dbias, float* dinitial) {
  conv::BackwardParams p{};
  fill(p, *c);
  p.dout = dout;
  p.dout_batch_stride = p.x_batch_stride;
  p.dout_dim_stride = p.x_dim_stride;
  p.dout_seq_stride = p.x_seq_stride;
  p.dx = dx;
  p.dx_batch_stride = p.x_batch_stride;
  p.dx_dim_stride = p.x_dim_stride;
  p.dx_seq_stride = p.x_seq_stride;
  p.dfinal_states = dfinal;
  p.dinitial_states = dinitial;
  if (p.width == 4) {
    run_backward<4>(p, c->channel_last, dweight, dbias);
  } else {
    run_backward<0>(p, c->channel_last, dweight, dbias);
  }
  if (dinitial != nullptr) for_each_thread(dim3(3), 5, [&] { kernels::initial_state_grad<float>(p, c->num_states); });
}

void update(int64_t batch, int64_t dim, int64_t tokens, int64_t width, int64_t state_len, int64_t slots, int64_t silu, const float* x,
            float* state, const float* weight, const float* bias, const int64_t* seen, const int64_t* indices, float* out) {
  conv::UpdateParams p{};
  p.batch = batch;
  p.dim = dim;
  p.num_tokens = tokens;
  p.width = width;
  p.state_len = state_len;
  p.num_slots = slots;
  p.silu = silu != 0;
  p.x = x;
  p.x_batch_stride = p.out_batch_stride = dim * tokens;
  p.x_dim_stride = p.out_dim_stride = tokens;
  p.x_seq_stride = p.out_seq_stride = 1;
  p.out = out;
  p.conv_state = state;
  p.state_batch_stride = dim * state_len;
  p.state_dim_stride = state_len;
  p.state_len_stride = 1;
  p.weight = weight;
  p.weight_dim_stride = width;
  p.weight_width_stride = 1;
  p.bias = bias;
  p.bias_stride = 1;
  p.cache_seqlens = seen;
  p.conv_state_indices = indices;
  for_each_thread(dim3(2), 7, [&] { kernels::update<float>(p); });
}

}  // extern "C"
