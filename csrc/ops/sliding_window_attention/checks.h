// Argument checks of sliding_window_attention, shared by the CPU and the CUDA twin.
#pragma once

#include <vector>

#include "adapter/check.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::sliding_window_attention {

// Everything but tensors.
struct Options {
  std::vector<int64_t> window_size;
  bool causal;
  std::optional<double> softmax_scale;
  double softcap;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
};

// Throws unless the call is sound; values behind device pointers are not looked at.
void check_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
                   const OptionalTensor& cu_seqlens_k, const Options& options);

void check_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& out, const Tensor& lse);

void check_update(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& cache_seqlens, const std::vector<int64_t>& window_size, std::optional<double> softmax_scale,
                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin);

// cache_seqlens and the positions they lead to.
void check_positions(const char* op, const std::vector<int64_t>& cache_seqlens, int64_t num_new,
                     const OptionalTensor& rotary_cos);

// Rows of the batch, or packed sequences (bounds on the CPU); checks the values of cu_seqlens and max_seqlen.
std::vector<Sequence> make_sequences(const char* op, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, const Options& options);

std::vector<int64_t> shape_of(const Tensor& t);
double scale_or_default(std::optional<double> softmax_scale, int64_t head_dim);
ScalarType lse_dtype(const Tensor& q);
// (B, H, Lq), packed (H, T).
std::vector<int64_t> lse_shape(const Tensor& q);

}  // namespace fastlm::sliding_window_attention
