// sliding_window_attention on CPU: the operators. How a call is set up stands in call.cpp.
#include <algorithm>
#include <tuple>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/sliding_window_attention/call.h"
#include "ops/sliding_window_attention/checks.h"
#include "ops/sliding_window_attention/cpu/kernels.h"

namespace fastlm::sliding_window_attention {
namespace {

using Window = std::vector<int64_t>;
using OptionalInt = std::optional<int64_t>;
using OptionalFloat = std::optional<double>;

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                   Window window_size, bool causal, OptionalFloat softmax_scale, double softcap,
                                   OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  constexpr const char* op = "sliding_window_attention";
  const Options options{window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k};
  const Forward pass(op, {q, k, v, cu_seqlens_q, cu_seqlens_k}, options);
  parallel_for_dynamic(op, pass.pieces(), 1, [&](int64_t begin, int64_t end) { pass.attend(begin, end); });
  return {pass.out, pass.lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                            Tensor lse, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                            Window window_size, bool causal, OptionalFloat softmax_scale, double softcap,
                                            OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  constexpr const char* op = "sliding_window_attention_backward";
  const Options options{window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k};
  check_forward(op, q, k, v, cu_seqlens_q, cu_seqlens_k, options);
  check_backward(dout, dlse, q, out, lse);
  const auto sequences = make_sequences(op, q, k, cu_seqlens_q, cu_seqlens_k, options);
  const ScalarType dtype = q.scalar_type();
  const Tensor dq = empty(shape_of(q), dtype, q);
  if (q.numel() == 0) return {dq, zeros(shape_of(k), dtype, k), zeros(shape_of(k), dtype, k)};
  const Tensor dk = empty(shape_of(k), dtype, k);
  const Tensor dv = empty(shape_of(k), dtype, k);
  q = unit_inner_stride(q);
  k = unit_inner_stride(k);
  v = unit_inner_stride(v);
  out = unit_inner_stride(out);
  dout = unit_inner_stride(dout);
  lse = torch::stable::contiguous(lse);
  const Tensor row_delta = empty(shape_of(lse), lse.scalar_type(), q);

  BackwardParams p{};
  fill_params(p, q, k, v, out, lse, options, sequences);
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

  const int64_t group = p.num_heads / p.num_kv_heads;
  PartialLayout layout{};
  layout.queries_per_block = std::max<int64_t>(1, kBackwardRows / group);
  layout.rows = ceil_div(layout.queries_per_block * group, kPartialRowsAlign) * kPartialRowsAlign;
  layout.columns = ceil_div(p.head_dim, kPartialAlign) * kPartialAlign;
  std::vector<int64_t> first_block, chunk_keys;
  std::vector<KeyChunk> chunks;
  for (const Sequence& s : sequences) {
    const int64_t span = std::min(p.left + p.right + 1, s.k_len);
    const int64_t keys = keys_per_chunk(span, layout.queries_per_block);
    const int64_t count = ceil_div(s.k_len, keys);
    first_block.push_back(layout.num_blocks);
    chunk_keys.push_back(keys);
    layout.num_blocks += ceil_div(s.q_len, layout.queries_per_block);
    // Chunks that a run of span + queries - 1 keys can touch.
    layout.num_partials =
        std::max({layout.num_partials, int64_t{1}, std::min(count, (span + layout.queries_per_block - 3 + keys) / keys + 1)});
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      for (int64_t begin = 0, c = 0; begin < sequences[i].k_len; begin += chunk_keys[i], ++c) {
        const int64_t end = std::min(begin + chunk_keys[i], sequences[i].k_len);
        chunks.push_back({static_cast<int64_t>(i), head, begin, end, c % layout.num_partials});
      }
    }
  }
  const Tensor partial =
      empty({layout.num_partials, p.num_kv_heads, layout.num_blocks, layout.rows, layout.columns}, lse.scalar_type(), q);
  layout.ptr = partial.data_ptr();
  layout.first_block = first_block.data();
  layout.chunk_keys = chunk_keys.data();

  const auto& kernels = FASTLM_CPU_KERNELS(sliding_window_attention_backward);
  const int i = kernel_index(dtype);
  const auto blocks = query_blocks(sequences, p.num_kv_heads, layout.queries_per_block);
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t grain = std::max<int64_t>(1, 65536 / (layout.rows * p.head_dim));
  parallel_for(op, num_blocks, grain, [&](int64_t begin, int64_t end) { kernels.row_delta[i](p, blocks.data(), begin, end); });
  parallel_for_dynamic(op, static_cast<int64_t>(chunks.size()), 1,
                       [&](int64_t begin, int64_t end) { kernels.chunks[i](p, layout, chunks.data(), begin, end); });
  parallel_for(op, num_blocks, grain,
               [&](int64_t begin, int64_t end) { kernels.reduce[i](p, layout, blocks.data(), begin, end); });
  return {dq, dk, dv};
}

Tensor update(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Window window_size,
              OptionalFloat softmax_scale, OptionalTensor rotary_cos, OptionalTensor rotary_sin) {
  constexpr const char* op = "sliding_window_attention_update";
  check_update(q, k, v, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, rotary_cos, rotary_sin);
  const std::vector<int64_t> seen = index_values(cache_seqlens);
  check_positions(seen, q.size(1), rotary_cos);
  const ScalarType dtype = q.scalar_type();
  const Tensor out = empty(shape_of(q), dtype, q);
  if (k.numel() == 0) return out;
  q = unit_inner_stride(q);
  k = unit_inner_stride(k);
  v = unit_inner_stride(v);

  UpdateParams p{};
  p.batch = q.size(0);
  p.num_new = q.size(1);
  p.num_heads = q.size(2);
  p.num_kv_heads = k.size(2);
  p.head_dim = q.size(3);
  p.ring = k_cache.size(1);
  p.left = window_size[0] < 0 ? p.ring : std::min(window_size[0], p.ring);
  p.softmax_scale = scale_or_default(softmax_scale, p.head_dim);
  p.q = rows_of<ConstHeadRows>(q);
  p.k = rows_of<ConstHeadRows>(k);
  p.v = rows_of<ConstHeadRows>(v);
  p.k_cache = rows_of<MutableHeadRows>(k_cache);
  p.v_cache = rows_of<MutableHeadRows>(v_cache);
  p.out = rows_of<MutableHeadRows>(out);
  p.cache_seqlens = seen.data();
  if (rotary_cos.has_value()) {
    p.rotary_cos = rotary_cos->data_ptr();
    p.rotary_sin = rotary_sin->data_ptr();
    p.rotary_dtype = param_dtype(*rotary_cos);
    p.cos_row_stride = rotary_cos->stride(0);
    p.cos_stride = rotary_cos->stride(1);
    p.sin_row_stride = rotary_sin->stride(0);
    p.sin_stride = rotary_sin->stride(1);
  }

  UpdateWorkspace w{};
  const int64_t rows = p.num_new * (p.num_heads / p.num_kv_heads);
  const int64_t held = std::min(p.left + p.num_new, p.ring);
  w.columns = ceil_div(p.head_dim, kQueryAlign) * kQueryAlign;
  w.splits = num_splits(held);
  const ScalarType acc = lse_dtype(q);
  const Tensor queries = empty({p.batch, p.num_new, p.num_heads, w.columns}, acc, q);
  const Tensor sums = empty({p.batch, p.num_kv_heads, w.splits, rows, w.columns}, acc, q);
  const Tensor weights = empty({p.batch, p.num_kv_heads, w.splits, rows, 2}, acc, q);
  w.queries = queries.data_ptr();
  w.sums = sums.data_ptr();
  w.weights = weights.data_ptr();

  const auto& kernels = FASTLM_CPU_KERNELS(sliding_window_attention_update);
  const int i = kernel_index(dtype);
  const auto run = [&](UpdatePhase phase, int64_t items, int64_t work_per_item) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_item));
    parallel_for(op, items, grain, [&](int64_t begin, int64_t end) { phase(p, w, begin, end); });
  };
  const int64_t heads = p.batch * p.num_kv_heads;
  run(kernels.write[i], p.batch * p.num_new, (p.num_heads + 2 * p.num_kv_heads) * p.head_dim);
  run(kernels.attend[i], heads * w.splits, 2 * rows * std::min(held, kSplit) * p.head_dim);
  run(kernels.merge[i], heads, rows * w.splits * p.head_dim);
  return out;
}

}  // namespace
}  // namespace fastlm::sliding_window_attention

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("sliding_window_attention", TORCH_BOX(&fastlm::sliding_window_attention::forward));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&fastlm::sliding_window_attention::backward));
  m.impl("sliding_window_attention_update", TORCH_BOX(&fastlm::sliding_window_attention::update));
}
