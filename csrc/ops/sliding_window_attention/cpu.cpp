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
  fill_gradients(p, dout, dlse, dq, dk, dv, row_delta);

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
  const Update step(op, {q, k, v, k_cache, v_cache, cache_seqlens, window_size, softmax_scale, rotary_cos, rotary_sin});
  for (const Update::Phase phase : {Update::kWrite, Update::kAttend, Update::kMerge}) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, step.work(phase)));
    parallel_for(op, step.pieces(phase), grain, [&](int64_t begin, int64_t end) { step.run(phase, begin, end); });
  }
  return step.out;
}

}  // namespace
}  // namespace fastlm::sliding_window_attention

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("sliding_window_attention", TORCH_BOX(&fastlm::sliding_window_attention::forward));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&fastlm::sliding_window_attention::backward));
  m.impl("sliding_window_attention_update", TORCH_BOX(&fastlm::sliding_window_attention::update));
}
