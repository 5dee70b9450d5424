// sliding_window_attention on CPU: from tensors to the parameters and pieces of work of the kernels.
#include "ops/sliding_window_attention/call.h"

#include <algorithm>

namespace fastlm::sliding_window_attention {

Tensor unit_inner_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

void fill_params(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                 const Options& options, const std::vector<Sequence>& sequences) {
  const int64_t n = q.dim();
  p.num_heads = q.size(n - 2);
  p.num_kv_heads = k.size(n - 2);
  p.head_dim = q.size(n - 1);
  const int64_t farthest = q.size(n - 3) + k.size(n - 3);
  const auto bound = [&](int64_t b) { return b < 0 ? farthest : std::min(b, farthest); };
  p.left = bound(options.window_size[0]);
  p.right = options.causal ? 0 : bound(options.window_size[1]);
  p.softmax_scale = scale_or_default(options.softmax_scale, p.head_dim);
  p.softcap = options.softcap;
  p.q = rows_of<ConstHeadRows>(q);
  p.k = rows_of<ConstHeadRows>(k);
  p.v = rows_of<ConstHeadRows>(v);
  p.out = rows_of<MutableHeadRows>(out);
  p.lse = lse.data_ptr();
  p.lse_batch_stride = n == 4 ? lse.stride(0) : 0;
  p.lse_head_stride = lse.stride(n - 3);
  p.sequences = sequences.data();
}

std::vector<QueryBlock> query_blocks(const std::vector<Sequence>& sequences, int64_t kv_heads, int64_t queries_per_block) {
  std::vector<QueryBlock> blocks;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t i = 0; i < sequences[s].q_len; i += queries_per_block) {
        blocks.push_back({static_cast<int64_t>(s), head, i, std::min(i + queries_per_block, sequences[s].q_len)});
      }
    }
  }
  return blocks;
}

namespace {

const Inputs& checked(const char* op, const Inputs& in, const Options& options) {
  check_forward(op, in.q, in.k, in.v, in.cu_seqlens_q, in.cu_seqlens_k, options);
  return in;
}

}  // namespace

Forward::Forward(const char* op, const Inputs& inputs, const Options& options)
    : in_(checked(op, inputs, options)),
      sequences_(make_sequences(op, in_.q, in_.k, in_.cu_seqlens_q, in_.cu_seqlens_k, options)) {
  out = empty(shape_of(in_.q), in_.q.scalar_type(), in_.q);
  lse = empty(lse_shape(in_.q), lse_dtype(in_.q), in_.q);
  if (out.numel() == 0) return;
  for (Tensor* t : {&in_.q, &in_.k, &in_.v}) *t = unit_inner_stride(*t);
  fill_params(p_, in_.q, in_.k, in_.v, out, lse, options, sequences_);
  const int64_t group = p_.num_heads / p_.num_kv_heads;
  blocks_ = query_blocks(sequences_, p_.num_kv_heads, std::max<int64_t>(1, query_block_rows(p_.head_dim) / group));
  kernel_ = FASTLM_CPU_KERNELS(sliding_window_attention_forward).forward[kernel_index(in_.q.scalar_type())];
}

}  // namespace fastlm::sliding_window_attention
