// sliding_window_attention on CPU: checks -> parameters -> kernels of the CPU level in use.
#include <algorithm>
#include <tuple>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/sliding_window_attention/checks.h"
#include "ops/sliding_window_attention/cpu/kernels.h"

namespace fastlm::sliding_window_attention {
namespace {

using Window = std::vector<int64_t>;
using OptionalInt = std::optional<int64_t>;
using OptionalFloat = std::optional<double>;

// `t` itself if its last dimension has unit stride (or one element), else a contiguous copy.
Tensor unit_inner_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

template <class Rows>
Rows rows_of(const Tensor& t) {
  const int64_t n = t.dim();
  return {t.data_ptr(), n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
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

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                   Window window_size, bool causal, OptionalFloat softmax_scale, double softcap,
                                   OptionalInt max_seqlen_q, OptionalInt max_seqlen_k) {
  constexpr const char* op = "sliding_window_attention";
  const Options options{window_size, causal, softmax_scale, softcap, max_seqlen_q, max_seqlen_k};
  check_forward(op, q, k, v, cu_seqlens_q, cu_seqlens_k, options);
  const auto sequences = make_sequences(op, q, k, cu_seqlens_q, cu_seqlens_k, options);
  const Tensor out = empty({q.sizes().begin(), q.sizes().end()}, q.scalar_type(), q);
  const Tensor lse = empty(lse_shape(q), lse_dtype(q), q);
  if (out.numel() == 0) return {out, lse};
  q = unit_inner_stride(q);
  k = unit_inner_stride(k);
  v = unit_inner_stride(v);

  Params p{};
  fill_params(p, q, k, v, out, lse, options, sequences);
  const int64_t group = p.num_heads / p.num_kv_heads;
  const auto blocks = query_blocks(sequences, p.num_kv_heads, std::max<int64_t>(1, query_block_rows(p.head_dim) / group));
  const auto kernel = FASTLM_CPU_KERNELS(sliding_window_attention_forward).forward[kernel_index(q.scalar_type())];
  parallel_for_dynamic(static_cast<int64_t>(blocks.size()), 1,
                       [&](int64_t begin, int64_t end) { kernel(p, blocks.data(), begin, end); });
  return {out, lse};
}

}  // namespace
}  // namespace fastlm::sliding_window_attention

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("sliding_window_attention", TORCH_BOX(&fastlm::sliding_window_attention::forward));
}
