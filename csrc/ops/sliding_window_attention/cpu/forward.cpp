// Sliding-window attention, forward: out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys that query i sees.
// A block of queries (all heads that share a key head) walks over the key blocks inside its window; keys and values are packed
// once per pair of blocks, scores are reduced by an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv
// 2205.14135) in fp32. Strips of kTileRows rows leave out the panels of keys that none of their rows sees, so little more than
// the window is computed. Bound by the multiply-add units.
//
// A row's bits depend on its own query, keys and values only: key blocks lie at fixed positions, masked scores are replaced, not
// computed with, and add exact zeros; where a masked value is not finite, rows are finished one by one.
#include "ops/sliding_window_attention/cpu/kernels.h"
#include "ops/sliding_window_attention/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using sliding_window_attention::QueryBlock;

constexpr int64_t kBlockKeys = 128;  // a multiple of kTileCols at every level
constexpr int64_t kSubRows = 24;     // rows that meet one panel of keys while it is in the first-level cache

template <class T>
struct ForwardTile {
  using E = operand_t<T>;
  using A = acc_t<T>;

  int64_t depth, q_stride, v_stride, s_stride, p_stride, o_stride;
  E* q;               // (rows, K)
  E* k;               // panels (kBlockKeys / kTileCols, K, kTileCols)
  E* v;               // (kBlockKeys, K), depth-major
  A* s;               // (kSubRows, kBlockKeys) scores, then weights
  E* p;               // weights as operands: s itself, or bf16 pairs
  A* o;               // (rows, K) sums of weight * value
  A *m, *l, *factor;  // per row: largest raw score, sum of weights, what the sums so far are multiplied by
  Range* visible;     // per row

  ForwardTile(Carve& memory, int64_t rows, int64_t head_dim) {
    depth = operand_depth<E>(head_dim);
    q_stride = padded_stride<E>(depth);
    v_stride = padded_stride<E>(head_dim);
    o_stride = padded_stride<A>(head_dim);
    s_stride = padded_stride<A>(kBlockKeys);
    q = memory.take<E>(rows * q_stride);
    k = memory.take<E>(kBlockKeys * depth);
    v = memory.take<E>(operand_depth<E>(kBlockKeys) * v_stride);
    s = memory.take<A>(kSubRows * s_stride);
    if constexpr (depth_per_operand<E> == 2) {
      p_stride = padded_stride<E>(kBlockKeys / 2);
      p = memory.take<E>(kSubRows * p_stride);
    } else {
      p_stride = s_stride;
      p = s;
    }
    o = memory.take<A>(rows * o_stride);
    m = memory.take<A>(rows);
    l = memory.take<A>(rows);
    factor = memory.take<A>(rows);
    visible = memory.take<Range>(rows);
  }
};

// One row of one key block: raw scores in s[from, to) become weights, of which [seen.begin, seen.end) are visible.
template <class T>
FASTLM_INLINE void softmax_row(const Scoring& score, acc_t<T>* s, operand_t<T>* weights, Range seen, int64_t from, int64_t to,
                               acc_t<T>& m, acc_t<T>& l, acc_t<T>& factor) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr A kInf = static_cast<A>(__builtin_inf());
  if (score.transform) {
    for (int64_t j = from; j < to; j += kLanes) store(s + j, score.apply(load(s + j)));
  }
  for (int64_t j = from; j < seen.begin; ++j) s[j] = -kInf;
  for (int64_t j = seen.end; j < to; ++j) s[j] = -kInf;

  V top0 = broadcast<V>(-kInf), top1 = top0;
  for (int64_t j = from; j < to; j += 2 * kLanes) {
    top0 = max(load(s + j), top0);  // a NaN score leaves the maximum alone and reaches the sum below
    top1 = max(load(s + j + kLanes), top1);
  }
  const A new_m = reduce_max(max(top0, max(top1, broadcast<V>(m))));
  const A base = new_m == -kInf ? A(0) : new_m;
  const A c = static_cast<A>(score.unit * kLog2eExact);
  const V shift = broadcast<V>(base), unit = broadcast<V>(c);
  V sum0 = zero<V>(), sum1 = sum0;
  for (int64_t j = from; j < to; j += 2 * kLanes) {
    const V w0 = exp2_nonpositive((load(s + j) - shift) * unit);
    const V w1 = exp2_nonpositive((load(s + j + kLanes) - shift) * unit);
    sum0 += w0;
    sum1 += w1;
    if constexpr (depth_per_operand<operand_t<T>> == 2) {
      store(reinterpret_cast<bfloat16*>(weights) + j, w0);
      store(reinterpret_cast<bfloat16*>(weights) + j + kLanes, w1);
    } else {
      store(weights + j, w0);
      store(weights + j + kLanes, w1);
    }
  }
  factor = exp2_nonpositive(broadcast<V>((m - base) * c))[0];
  l = l * factor + reduce_add(sum0 + sum1);
  m = new_m;
}

// kSubRows rows of the block against the keys [keys.begin, keys.end) of one key block, which starts at position `base`.
template <class T>
void attend(const ForwardTile<T>& t, const Scoring& score, int64_t r0, int64_t rows, int64_t head_dim, int64_t base,
            bool values_finite) {
  using E = operand_t<T>;
  constexpr int64_t kDepth = depth_per_operand<E>;
  constexpr int64_t kStrips = kSubRows / kTileRows;
  Range seen[kStrips];  // keys that any row of the strip sees
  int64_t from = kBlockKeys, to = 0;
  const int64_t strips = min_of(kStrips, ceil_div(rows - r0, kTileRows));
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = r0 + i * kTileRows, last = min_of(first + kTileRows, rows) - 1;
    seen[i] = clip({t.visible[first].begin - base, t.visible[last].end - base}, 0, kBlockKeys);
    if (seen[i].begin == seen[i].end) continue;
    from = min_of(from, seen[i].begin / kTileCols<E> * kTileCols<E>);
    to = max_of(to, seen[i].end);
  }
  if (to == 0) return;

  for (int64_t j = from; j < to; j += kTileCols<E>) {
    for (int64_t i = 0; i < strips; ++i) {
      if (seen[i].end <= j || seen[i].begin >= j + kTileCols<E>) continue;
      gemm_tile<E, Layout::kRowMajor, Start::kZero>(t.q + (r0 + i * kTileRows) * t.q_stride, t.q_stride, t.k + j * t.depth,
                                                    kTileCols<E>, t.depth, t.s + i * kTileRows * t.s_stride + j, t.s_stride,
                                                    nullptr);
    }
  }

  bool exact[kStrips] = {};
  for (int64_t i = 0; i < strips; ++i) {
    if (seen[i].begin == seen[i].end) continue;
    const Range span = {seen[i].begin / kTileCols<E> * kTileCols<E>, round_up(seen[i].end, kTileCols<E>)};
    for (int64_t k = 0; k < kTileRows; ++k) {
      const int64_t r = r0 + i * kTileRows + k;
      const Range own = r < rows ? clip({t.visible[r].begin - base, t.visible[r].end - base}, span.begin, span.end)
                                 : Range{span.begin, span.begin};
      const int64_t row = i * kTileRows + k;
      softmax_row<T>(score, t.s + row * t.s_stride, t.p + row * t.p_stride, own, span.begin, span.end, t.m[r], t.l[r],
                     t.factor[r]);
      exact[i] |= !values_finite && r < rows &&
                  (own.begin != seen[i].begin / kDepth * kDepth || own.end != round_up(seen[i].end, kDepth));
    }
  }

  constexpr int64_t kCols = kTileCols<E>, kHalf = kCols / 2;
  for (int64_t n = 0; n < head_dim; n += kCols) {
    const bool full = head_dim - n > kHalf;
    for (int64_t i = 0; i < strips; ++i) {
      if (seen[i].begin == seen[i].end || exact[i]) continue;
      const int64_t d = seen[i].begin / kDepth, r = r0 + i * kTileRows;
      const E* weights = t.p + i * kTileRows * t.p_stride + d;
      const auto tile =
          full ? gemm_tile<E, Layout::kRowMajor, Start::kScale> : gemm_half_tile<E, Layout::kRowMajor, Start::kScale>;
      tile(weights, t.p_stride, t.v + d * t.v_stride + n, t.v_stride, operand_depth<E>(seen[i].end) - d, t.o + r * t.o_stride + n,
           t.o_stride, t.factor + r);
    }
  }
  for (int64_t i = 0; i < strips; ++i) {
    if (!exact[i]) continue;
    for (int64_t k = 0; k < kTileRows && r0 + i * kTileRows + k < rows; ++k) {
      const int64_t row = i * kTileRows + k, r = r0 + row;
      const Range own = clip({t.visible[r].begin - base, t.visible[r].end - base}, 0, kBlockKeys);
      acc_t<T>* o = t.o + r * t.o_stride;
      for (int64_t n = 0; n < head_dim; n += lanes_of<T>) store(o + n, load(o + n) * broadcast<vec_t<T>>(t.factor[r]));
      gemm_row_exact(t.p + row * t.p_stride, 1, t.v, t.v_stride, own.begin, own.end, o, head_dim);
    }
  }
}

template <class T>
void finish(const Params& p, const QueryBlock& b, const Sequence& s, const ForwardTile<T>& t, double unit) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t i = b.begin; i < b.end; ++i) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = (i - b.begin) * group + g, head = b.kv_head * group + g;
      const A* o = t.o + r * t.o_stride;
      T* out = head_row<T>(p.out, s.batch, s.q_begin + i, head);
      const A inverse = t.l[r] == A(0) ? A(0) : A(1) / t.l[r];  // no key: 0
      for (int64_t n = 0; n < p.head_dim; n += kLanes) store_upto(out + n, load(o + n) * inverse, p.head_dim - n);
      A* lse = static_cast<A*>(p.lse) + s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_begin + i;
      *lse = t.m[r] * static_cast<A>(unit) + log(broadcast<vec_t<T>>(t.l[r]))[0];
    }
  }
}

template <class T>
void forward_block(const Params& p, const QueryBlock& b, const ForwardTile<T>& t) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  const Sequence& s = p.sequences[b.sequence];
  const Scoring score(p);
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t rows = (b.end - b.begin) * group, padded = round_up(rows, kTileRows);
  auto probe = zero<vec_t<T>>();
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t i = b.begin + r / group;
    const int64_t real = r < rows ? p.head_dim : 0;
    const T* q = head_row<T>(p.q, s.batch, s.q_begin + min_of(i, b.end - 1), b.kv_head * group + r % group);
    pack_row<E>(q, real, t.q + r * t.q_stride, round_up(t.depth, lanes_of<T>), probe);
    if (r < rows) t.visible[r] = visible_keys(p, s, i);
    t.m[r] = static_cast<A>(-__builtin_inf());
    t.l[r] = A(0);
  }
  __builtin_memset(t.o, 0, static_cast<size_t>(padded * t.o_stride) * sizeof(A));

  const Range all = {t.visible[0].begin, t.visible[rows - 1].end};
  for (int64_t base = all.begin / kBlockKeys * kBlockKeys; base < all.end; base += kBlockKeys) {
    const Range keys = clip({all.begin - base, all.end - base}, 0, kBlockKeys);
    auto values = zero<vec_t<T>>();
    pack_columns<E>(head_row<T>(p.k, s.batch, s.k_begin + base, b.kv_head), p.k.seq_stride, keys.begin, keys.end, p.head_dim,
                    t.k);
    pack_depths<E>(head_row<T>(p.v, s.batch, s.k_begin + base, b.kv_head), p.v.seq_stride, keys.begin, keys.end, p.head_dim, t.v,
                   t.v_stride, round_up(p.head_dim, lanes_of<T>), values);
    const bool finite = !probe_found(values);
    for (int64_t r = 0; r < padded; r += kSubRows) attend<T>(t, score, r, rows, p.head_dim, base, finite);
  }
  finish<T>(p, b, s, t, score.unit);
}

template <class T>
void forward(const Params& p, const QueryBlock* blocks, int64_t begin, int64_t end) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  int64_t rows = 0;
  for (int64_t i = begin; i < end; ++i) rows = max_of(rows, round_up((blocks[i].end - blocks[i].begin) * group, kTileRows));
  Carve count{nullptr};
  ForwardTile<T> size(count, rows, p.head_dim);
  Carve memory{static_cast<char*>(thread_scratch(count.used))};
  const ForwardTile<T> tile(memory, rows, p.head_dim);
  for (int64_t i = begin; i < end; ++i) forward_block<T>(p, blocks[i], tile);
}

}  // namespace

extern const sliding_window_attention::ForwardKernels sliding_window_attention_forward;
const sliding_window_attention::ForwardKernels sliding_window_attention_forward = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
