// Argument checks of sliding_window_attention.
#include "ops/sliding_window_attention/checks.h"

#include <cmath>

namespace fastlm::sliding_window_attention {
namespace {

void check_window(const char* op, const std::vector<int64_t>& window_size) {
  FASTLM_CHECK_VALUE(window_size.size() == 2, op, ": window_size must have 2 bounds (left, right), got ", window_size.size());
  for (const int64_t bound : window_size) {
    FASTLM_CHECK_VALUE(bound >= -1, op, ": window_size must have bounds of at least -1 (no bound), got (", window_size[0], ", ",
                       window_size[1], ")");
  }
}

void check_scale(const char* op, std::optional<double> softmax_scale) {
  if (!softmax_scale.has_value()) return;
  FASTLM_CHECK_VALUE(std::isfinite(*softmax_scale), op, ": softmax_scale must be finite, got ", *softmax_scale);
}

// Heads of k and v against those of q; the last two dimensions are heads and K.
void check_heads(const char* op, const Tensor& q, const Tensor& k) {
  const int64_t heads = q.size(q.dim() - 2), kv_heads = k.size(k.dim() - 2), head_dim = q.size(q.dim() - 1);
  FASTLM_CHECK_VALUE(head_dim >= 1 && head_dim <= kMaxHeadDim, op, ": q must have a head dim between 1 and ", kMaxHeadDim,
                     ", got ", head_dim);
  FASTLM_CHECK_VALUE(k.size(k.dim() - 1) == head_dim, op, ": k must have the head dim of q, ", head_dim, ", got ",
                     k.size(k.dim() - 1));
  FASTLM_CHECK_VALUE(kv_heads >= 1 && heads % kv_heads == 0, op, ": k must have a number of heads that divides that of q, ",
                     heads, ", got ", kv_heads);
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_same_dtype(op, name, t, "q", q);
  check_same_device(op, name, t, "q", q);
}

// Written in place, so there is no copy to fall back to.
void check_unit_stride(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  FASTLM_CHECK_VALUE(t.stride(last) == 1 || t.size(last) <= 1, op, ": ", name,
                     " must have stride 1 over its last dimension, got ", t.stride(last));
}

void check_longest(const char* op, const char* name, std::optional<int64_t> given, const std::vector<int64_t>& bounds) {
  if (!given.has_value()) return;
  int64_t longest = 0;
  for (size_t i = 1; i < bounds.size(); ++i) longest = max_of(longest, bounds[i] - bounds[i - 1]);
  FASTLM_CHECK_VALUE(*given >= longest, op, ": ", name, " must be at least the longest sequence, ", longest, ", got ", *given);
}

}  // namespace

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

double scale_or_default(std::optional<double> softmax_scale, int64_t head_dim) {
  return softmax_scale.has_value() ? *softmax_scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

ScalarType lse_dtype(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

std::vector<int64_t> lse_shape(const Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

void check_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
                   const OptionalTensor& cu_seqlens_k, const Options& options) {
  FASTLM_CHECK_VALUE(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), op,
                     ": cu_seqlens_q and cu_seqlens_k must be given together");
  const bool packed = cu_seqlens_q.has_value();
  check_floating(op, "q", q);
  check_dim(op, "q", q, packed ? 3 : 4, packed ? "(T, H, K)" : "(B, Lq, H, K)");
  check_dim(op, "k", k, packed ? 3 : 4, packed ? "(T, Hkv, K)" : "(B, Lk, Hkv, K)");
  check_like(op, "k", k, q);
  FASTLM_CHECK_VALUE(packed || k.size(0) == q.size(0), op, ": k must have the batch size of q, ", q.size(0), ", got ", k.size(0));
  check_heads(op, q, k);
  check_shape(op, "v", v, shape_of(k));
  check_like(op, "v", v, q);
  check_window(op, options.window_size);
  check_scale(op, options.softmax_scale);
  FASTLM_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), op,
                     ": softcap must be finite and not negative, got ", options.softcap);
  if (!packed) {
    FASTLM_CHECK_VALUE(!options.max_seqlen_q.has_value() && !options.max_seqlen_k.has_value(), op,
                       ": max_seqlen_q and max_seqlen_k must be None without cu_seqlens_q and cu_seqlens_k");
    return;
  }
  for (const auto& [name, t] : {std::pair{"cu_seqlens_q", &*cu_seqlens_q}, std::pair{"cu_seqlens_k", &*cu_seqlens_k}}) {
    check_cu_seqlens_shape(op, name, *t, t == &*cu_seqlens_q ? q.size(0) : k.size(0));
    check_same_device(op, name, *t, "q", q);
  }
  check_shape(op, "cu_seqlens_k", *cu_seqlens_k, {cu_seqlens_q->size(0)});
}

void check_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& out, const Tensor& lse) {
  constexpr const char* op = "sliding_window_attention_backward";
  check_shape(op, "dout", dout, shape_of(q));
  check_like(op, "dout", dout, q);
  check_shape(op, "out", out, shape_of(q));
  check_like(op, "out", out, q);
  check_shape(op, "lse", lse, lse_shape(q));
  FASTLM_CHECK_VALUE(lse.scalar_type() == lse_dtype(q), op, ": lse must have dtype ", dtype_name(lse_dtype(q)), ", got ",
                     dtype_name(lse.scalar_type()));
  check_same_device(op, "lse", lse, "q", q);
  if (dlse.has_value()) {
    check_shape(op, "dlse", *dlse, lse_shape(q));
    check_same_dtype(op, "dlse", *dlse, "lse", lse);
    check_same_device(op, "dlse", *dlse, "q", q);
  }
}

void check_update(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& cache_seqlens, const std::vector<int64_t>& window_size, std::optional<double> softmax_scale,
                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin) {
  check_floating(op, "q", q);
  check_dim(op, "q", q, 4, "(B, m, H, K)");
  check_dim(op, "k", k, 4, "(B, m, Hkv, K)");
  check_like(op, "k", k, q);
  check_heads(op, q, k);
  check_shape(op, "k", k, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_shape(op, "v", v, shape_of(k));
  check_like(op, "v", v, q);
  check_window(op, window_size);
  check_scale(op, softmax_scale);
  check_dim(op, "k_cache", k_cache, 4, "(B, R, Hkv, K)");
  check_shape(op, "k_cache", k_cache, {q.size(0), k_cache.size(1), k.size(2), q.size(3)});
  check_like(op, "k_cache", k_cache, q);
  // Slots needed: the window (its bound and the token itself) behind the first of m tokens. Compared without a sum that could
  // overflow.
  const int64_t left = max_of(window_size[0], 0);
  FASTLM_CHECK_VALUE(left <= k_cache.size(1) && q.size(1) <= k_cache.size(1) - left, op, ": k_cache must have at least ", left,
                     " + ", q.size(1), " slots (left bound of the window + new tokens), got ", k_cache.size(1));
  check_shape(op, "v_cache", v_cache, shape_of(k_cache));
  check_like(op, "v_cache", v_cache, q);
  check_unit_stride(op, "k_cache", k_cache);
  check_unit_stride(op, "v_cache", v_cache);
  check_index_vector(op, "cache_seqlens", cache_seqlens);
  check_shape(op, "cache_seqlens", cache_seqlens, {q.size(0)});
  check_same_device(op, "cache_seqlens", cache_seqlens, "q", q);
  FASTLM_CHECK_VALUE(rotary_cos.has_value() == rotary_sin.has_value(), op, ": rotary_cos and rotary_sin must be given together");
  if (!rotary_cos.has_value()) return;
  FASTLM_CHECK_VALUE(q.size(3) % 2 == 0, op, ": q must have an even head dim when rotary_cos is given, got ", q.size(3));
  check_dim(op, "rotary_cos", *rotary_cos, 2, "(P, K/2)");
  check_floating(op, "rotary_cos", *rotary_cos);
  check_shape(op, "rotary_cos", *rotary_cos, {rotary_cos->size(0), q.size(3) / 2});
  check_same_device(op, "rotary_cos", *rotary_cos, "q", q);
  check_shape(op, "rotary_sin", *rotary_sin, shape_of(*rotary_cos));
  check_same_dtype(op, "rotary_sin", *rotary_sin, "rotary_cos", *rotary_cos);
  check_same_device(op, "rotary_sin", *rotary_sin, "q", q);
}

void check_positions(const char* op, const std::vector<int64_t>& cache_seqlens, int64_t num_new,
                     const OptionalTensor& rotary_cos) {
  constexpr int64_t kMaxPosition = int64_t{1} << 62;
  for (size_t i = 0; i < cache_seqlens.size(); ++i) {
    FASTLM_CHECK_VALUE(cache_seqlens[i] >= 0 && cache_seqlens[i] <= kMaxPosition, op,
                       ": cache_seqlens must lie between 0 and 2^62, got ", cache_seqlens[i], " at index ", i);
    FASTLM_CHECK_INDEX(!rotary_cos.has_value() || cache_seqlens[i] + num_new <= rotary_cos->size(0), op,
                       ": cache_seqlens must lead to positions below ", rotary_cos->size(0),
                       " (rows of rotary_cos), got position ", cache_seqlens[i] + num_new - 1, " at index ", i);
  }
}

std::vector<Sequence> make_sequences(const char* op, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, const Options& options) {
  std::vector<Sequence> sequences;
  if (!cu_seqlens_q.has_value()) {
    for (int64_t b = 0; b < q.size(0); ++b) sequences.push_back({b, 0, q.size(1), 0, k.size(1)});
    return sequences;
  }
  const std::vector<int64_t> bounds_q = check_cu_seqlens(op, "cu_seqlens_q", *cu_seqlens_q, q.size(0));
  const std::vector<int64_t> bounds_k = check_cu_seqlens(op, "cu_seqlens_k", *cu_seqlens_k, k.size(0));
  check_longest(op, "max_seqlen_q", options.max_seqlen_q, bounds_q);
  check_longest(op, "max_seqlen_k", options.max_seqlen_k, bounds_k);
  for (size_t i = 0; i + 1 < bounds_q.size(); ++i) {
    sequences.push_back({0, bounds_q[i], bounds_q[i + 1] - bounds_q[i], bounds_k[i], bounds_k[i + 1] - bounds_k[i]});
  }
  return sequences;
}

}  // namespace fastlm::sliding_window_attention
