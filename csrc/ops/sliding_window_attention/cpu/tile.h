// Geometry and working memory shared by the forward and the backward kernels.
#pragma once

#include "core/scratch.h"
#include "core/simd/pack.h"
#include "ops/sliding_window_attention/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using sliding_window_attention::ConstHeadRows;
using sliding_window_attention::MutableHeadRows;
using sliding_window_attention::Params;
using sliding_window_attention::Sequence;

struct Range {
  int64_t begin, end;
};

// What of r lies in [begin, end); if nothing does, an empty range at the nearer end.
FASTLM_INLINE Range clip(Range r, int64_t begin, int64_t end) {
  const int64_t lower = min_of(max_of(r.begin, begin), end);
  return {lower, max_of(lower, min_of(r.end, end))};
}

FASTLM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Keys that query i sees; both ends never decrease with i.
FASTLM_INLINE Range visible_keys(const Params& p, const Sequence& s, int64_t i) {
  const int64_t position = i + s.k_len - s.q_len;
  const int64_t end = max_of(min_of(position + p.right + 1, s.k_len), 0);
  return {min_of(max_of(position - p.left, 0), end), end};
}

// Queries that see key j.
FASTLM_INLINE Range visible_queries(const Params& p, const Sequence& s, int64_t j) {
  const int64_t at = j - s.k_len + s.q_len;
  const int64_t end = max_of(min_of(at + p.left + 1, s.q_len), 0);
  return {min_of(max_of(at - p.right, 0), end), end};
}

// The K values of one position and head.
template <class T>
FASTLM_INLINE const T* head_row(const ConstHeadRows& rows, int64_t batch, int64_t position, int64_t head) {
  return static_cast<const T*>(rows.ptr) + batch * rows.batch_stride + position * rows.seq_stride + head * rows.head_stride;
}
template <class T>
FASTLM_INLINE T* head_row(const MutableHeadRows& rows, int64_t batch, int64_t position, int64_t head) {
  return static_cast<T*>(rows.ptr) + batch * rows.batch_stride + position * rows.seq_stride + head * rows.head_stride;
}

// Distance of rows of `n` operands: whole vectors, and an odd number of cache lines, so that a column of rows spreads over the
// cache.
template <class E>
FASTLM_INLINE int64_t padded_stride(int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(E));
  const int64_t lines = ceil_div(round_up(n, lanes_of<operand_acc<E>>), kLine);
  return (lines | 1) * kLine;
}

// Cuts arrays out of one piece of memory; with a null base it only counts the bytes.
struct Carve {
  char* base;
  size_t used = 0;

  template <class X>
  FASTLM_INLINE X* take(int64_t n) {
    X* p = reinterpret_cast<X*>(base + used);
    used += (static_cast<size_t>(n) * sizeof(X) + 63) / 64 * 64;
    return base == nullptr ? nullptr : p;
  }
};

// Brings rows of keys and values into the second-level cache, a few at a time, while others are computed with.
struct Prefetch {
  const char *k, *v;  // next rows
  int64_t k_stride, v_stride, row_bytes;
  int64_t rows;      // still to come
  int64_t per_step;  // rows of either

  FASTLM_INLINE void step() {
    for (int64_t i = 0; i < per_step && rows > 0; ++i, --rows) {
      for (int64_t at = 0; at < row_bytes; at += 64) {
        __builtin_prefetch(k + at, 0, 2);
        __builtin_prefetch(v + at, 0, 2);
      }
      k += k_stride;
      v += v_stride;
    }
  }
};

// How scores leave the product q . k: s = unit * raw. Where that is not all (softcap, a scale that is not positive), the raw
// products are first replaced by scores in natural units.
struct Scoring {
  bool transform;
  double scale, softcap;
  double unit;

  FASTLM_INLINE explicit Scoring(const Params& p)
      : transform(p.softcap > 0 || !(p.softmax_scale > 0)),
        scale(p.softmax_scale),
        softcap(p.softcap),
        unit(transform ? 1.0 : p.softmax_scale) {}

  template <class V>
  FASTLM_INLINE V apply(V raw) const {
    using A = typename ScalarOf<V>::type;
    if (softcap > 0) return tanh(raw * static_cast<A>(scale / softcap)) * static_cast<A>(softcap);
    return raw * static_cast<A>(scale);
  }
};

constexpr double kLog2eExact = 1.4426950408889634074;

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
