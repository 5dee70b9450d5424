// sliding_window_attention: from tensors to parameters; on CPU, to the pieces of work of the kernels.
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

void fill_gradients(BackwardParams& p, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq, const Tensor& dk,
                    const Tensor& dv, const Tensor& row_delta) {
  p.dout = rows_of<ConstHeadRows>(dout);
  p.dq = rows_of<MutableHeadRows>(dq);
  p.dk = rows_of<MutableHeadRows>(dk);
  p.dv = rows_of<MutableHeadRows>(dv);
  p.row_delta = row_delta.data_ptr();
  if (dlse.has_value()) {
    const int64_t n = dlse->dim();
    p.dlse = dlse->data_ptr();
    p.dlse_batch_stride = n == 3 ? dlse->stride(0) : 0;
    p.dlse_head_stride = dlse->stride(n - 2);
    p.dlse_seq_stride = dlse->stride(n - 1);
  }
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

void fill_update(UpdateParams& p, UpdateInputs& in, const Tensor& out) {
  for (Tensor* t : {&in.q, &in.k, &in.v}) *t = unit_inner_stride(*t);
  p.batch = in.q.size(0);
  p.num_new = in.q.size(1);
  p.num_heads = in.q.size(2);
  p.num_kv_heads = in.k.size(2);
  p.head_dim = in.q.size(3);
  p.ring = in.k_cache.size(1);
  p.left = in.window_size[0] < 0 ? p.ring : std::min(in.window_size[0], p.ring);
  p.softmax_scale = scale_or_default(in.softmax_scale, p.head_dim);
  p.q = rows_of<ConstHeadRows>(in.q);
  p.k = rows_of<ConstHeadRows>(in.k);
  p.v = rows_of<ConstHeadRows>(in.v);
  p.k_cache = rows_of<MutableHeadRows>(in.k_cache);
  p.v_cache = rows_of<MutableHeadRows>(in.v_cache);
  p.out = rows_of<MutableHeadRows>(out);
  if (!in.rotary_cos.has_value()) return;
  const Tensor &cos = *in.rotary_cos, &sin = *in.rotary_sin;
  p.rotary_cos = cos.data_ptr();
  p.rotary_sin = sin.data_ptr();
  p.rotary_rows = cos.size(0);
  p.rotary_dtype = param_dtype(cos);
  p.cos_row_stride = cos.stride(0);
  p.cos_stride = cos.stride(1);
  p.sin_row_stride = sin.stride(0);
  p.sin_stride = sin.stride(1);
}

Update::Update(const char* op, const UpdateInputs& inputs) : in_(inputs) {
  check_update(op, in_.q, in_.k, in_.v, in_.k_cache, in_.v_cache, in_.cache_seqlens, in_.window_size, in_.softmax_scale,
               in_.rotary_cos, in_.rotary_sin);
  seen_ = index_values(in_.cache_seqlens);
  check_positions(op, seen_, in_.q.size(1), in_.rotary_cos);
  out = empty(shape_of(in_.q), in_.q.scalar_type(), in_.q);
  if (in_.k.numel() == 0) return;
  fill_update(p_, in_, out);
  p_.cache_seqlens = seen_.data();

  rows_ = p_.num_new * (p_.num_heads / p_.num_kv_heads);
  held_ = std::min(p_.left + p_.num_new, p_.ring);
  w_.columns = ceil_div(p_.head_dim, kQueryAlign) * kQueryAlign;
  w_.splits = num_splits(held_);
  const auto take = [&](const std::vector<int64_t>& shape) {
    memory_.push_back(empty(shape, lse_dtype(in_.q), in_.q));
    return memory_.back().data_ptr();
  };
  w_.queries = take({p_.batch, p_.num_new, p_.num_heads, w_.columns});
  w_.sums = take({p_.batch, p_.num_kv_heads, w_.splits, rows_, w_.columns});
  w_.weights = take({p_.batch, p_.num_kv_heads, w_.splits, rows_, 2});
  kernel_ = kernel_index(in_.q.scalar_type());
}

int64_t Update::pieces(Phase phase) const {
  const int64_t heads = p_.batch * p_.num_kv_heads;  // 0 where there is nothing to do
  return phase == kWrite ? p_.batch * p_.num_new : phase == kAttend ? heads * w_.splits : heads;
}

int64_t Update::work(Phase phase) const {
  if (phase == kWrite) return (p_.num_heads + 2 * p_.num_kv_heads) * p_.head_dim;
  if (phase == kAttend) return 2 * rows_ * std::min(held_, kSplit) * p_.head_dim;
  return rows_ * w_.splits * p_.head_dim;
}

void Update::run(Phase phase, int64_t begin, int64_t end) const {
  const auto& kernels = FASTLM_CPU_KERNELS(sliding_window_attention_update);
  const UpdatePhase kernel = phase == kWrite    ? kernels.write[kernel_]
                             : phase == kAttend ? kernels.attend[kernel_]
                                                : kernels.merge[kernel_];
  kernel(p_, w_, begin, end);
}

}  // namespace fastlm::sliding_window_attention
