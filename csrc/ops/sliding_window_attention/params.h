// What the kernels of sliding_window_attention see: plain pointers and strides (in elements). Shared by the CPU and the CUDA
// twin.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::sliding_window_attention {

// Larger heads are refused: it bounds the kernels' working memory.
constexpr int64_t kMaxHeadDim = 512;

// A tensor (B, L, heads, K) with unit stride over K; packed (T, heads, K) has batch_stride 0.
struct ConstHeadRows {
  const void* ptr;
  int64_t batch_stride, seq_stride, head_stride;
};
struct MutableHeadRows {
  void* ptr;
  int64_t batch_stride, seq_stride, head_stride;
};

// Queries and the keys they may see: one row of the batch, or one packed sequence.
struct Sequence {
  int64_t batch;
  int64_t q_begin, q_len;  // positions of the query tensor
  int64_t k_begin, k_len;  // positions of the key and value tensors
};

// The same on the device. cu_q and cu_k null: `num_sequences` rows of the batch with total_q queries and total_k keys each;
// otherwise bounds of packed sequences, (num_sequences + 1,), whose values nobody has checked.
struct DeviceSequences {
  const void *cu_q, *cu_k;
  bool cu_q_64, cu_k_64;  // int64, else int32
  int64_t num_sequences;
  int64_t total_q, total_k;  // positions of the tensors
};

// Query i of a sequence stands at key position i + k_len - q_len and sees `left` keys before it and `right` after it.
struct Params {
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t left, right;  // not negative, at most q_len + k_len: sums of positions and bounds stay far from overflow
  double softmax_scale;
  double softcap;  // 0: none

  ConstHeadRows q, k, v;  // (B, Lq, H, K), (B, Lk, Hkv, K), element type T
  MutableHeadRows out;    // (B, Lq, H, K), T
  void* lse;              // (B, H, Lq) or (H, T), accumulation type
  int64_t lse_batch_stride, lse_head_stride;

  const Sequence* sequences;  // CPU only
  DeviceSequences device;     // CUDA only
};

struct BackwardParams : Params {  // `out` and `lse` are inputs here
  ConstHeadRows dout;             // (B, Lq, H, K), T
  const void* dlse;               // like lse with strides of its own, or null
  int64_t dlse_batch_stride, dlse_head_stride, dlse_seq_stride;
  MutableHeadRows dq, dk, dv;  // T
  void* row_delta;             // like lse: sum over K of dout * out, minus dlse
};

// m new tokens per row of the batch. The token at position n lies at slot n mod ring of the caches.
struct UpdateParams {
  int64_t batch, num_new, num_heads, num_kv_heads, head_dim, ring;
  int64_t left;  // keys seen before a token's own; not negative, at most ring
  double softmax_scale;

  ConstHeadRows q, k, v;             // (B, m, H, K), (B, m, Hkv, K), T
  MutableHeadRows k_cache, v_cache;  // (B, ring, Hkv, K), T
  MutableHeadRows out;               // (B, m, H, K), T
  const int64_t* cache_seqlens;      // (B,) tokens before this call; CPU
  const void* device_seqlens;        // the same behind a device pointer, contiguous, int32 or int64; CUDA
  bool device_seqlens_64;

  const void *rotary_cos, *rotary_sin;  // (P, K/2), or null
  int64_t rotary_rows;                  // P; CUDA clamps positions into the table
  DType rotary_dtype;
  int64_t cos_row_stride, cos_stride, sin_row_stride, sin_stride;
};

}  // namespace fastlm::sliding_window_attention
