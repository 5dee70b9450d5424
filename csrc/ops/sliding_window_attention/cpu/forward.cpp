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

// One strip of one key block: raw scores in columns [span.begin, span.end) become weights; row k sees the keys [own[k]] of them.
template <class T>
FASTLM_INLINE void softmax_strip(const Scoring& score, acc_t<T>* s, int64_t s_stride, operand_t<T>* weights, int64_t p_stride,
                                 const Range* own, Range span, acc_t<T>* m, acc_t<T>* l, acc_t<T>* factor) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr A kInf = static_cast<A>(__builtin_inf());
  const A c = static_cast<A>(score.unit * kLog2eExact);
  A shift[kTileRows];
  for (int64_t k = 0; k < kTileRows; ++k) {
    A* row = s + k * s_stride;
    if (score.transform) {
      for (int64_t j = span.begin; j < span.end; j += kLanes) store(row + j, score.apply(load(row + j)));
    }
    for (int64_t j = span.begin; j < own[k].begin; ++j) row[j] = -kInf;
    for (int64_t j = own[k].end; j < span.end; ++j) row[j] = -kInf;
    V top0 = broadcast<V>(m[k]), top1 = top0;
    for (int64_t j = span.begin; j < span.end; j += 2 * kLanes) {
      top0 = max(load(row + j), top0);  // a NaN score leaves the maximum alone and reaches the sum below
      top1 = max(load(row + j + kLanes), top1);
    }
    const A top = reduce_max(max(top0, top1));
    shift[k] = top == -kInf ? A(0) : top;
    factor[k] = (m[k] - shift[k]) * c;
    m[k] = top;
  }
  for (int64_t k = 0; k < kTileRows; ++k) factor[k] = exp2_nonpositive(broadcast<V>(factor[k]))[0];
  for (int64_t k = 0; k < kTileRows; ++k) {
    const A* row = s + k * s_stride;
    operand_t<T>* to = weights + k * p_stride;
    const V base = broadcast<V>(shift[k]), unit = broadcast<V>(c);
    V sum0 = zero<V>(), sum1 = sum0;
    for (int64_t j = span.begin; j < span.end; j += 2 * kLanes) {
      const V w0 = exp2_nonpositive((load(row + j) - base) * unit);
      const V w1 = exp2_nonpositive((load(row + j + kLanes) - base) * unit);
      sum0 += w0;
      sum1 += w1;
      if constexpr (depth_per_operand<operand_t<T>> == 2) {
        store(reinterpret_cast<bfloat16*>(to) + j, w0);
        store(reinterpret_cast<bfloat16*>(to) + j + kLanes, w1);
      } else {
        store(to + j, w0);
        store(to + j + kLanes, w1);
      }
    }
    l[k] = l[k] * factor[k] + reduce_add(sum0 + sum1);
  }
}

// Rows [r0, r0 + kSubRows) of the block against the key block at position `base`.
template <class T>
void attend(const ForwardTile<T>& t, const Scoring& score, int64_t r0, int64_t rows, int64_t head_dim, int64_t base,
            bool values_finite) {
  using E = operand_t<T>;
  constexpr int64_t kDepth = depth_per_operand<E>, kStrips = kSubRows / kTileRows;
  Strip<E> product[kStrips];
  const int64_t strips = min_of(kStrips, ceil_div(rows - r0, kTileRows));
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = r0 + i * kTileRows, last = min_of(first + kTileRows, rows) - 1;
    const Range seen = clip({t.visible[first].begin - base, t.visible[last].end - base}, 0, kBlockKeys);
    product[i] = {t.q + first * t.q_stride, t.s + i * kTileRows * t.s_stride, nullptr, seen.begin, seen.end};
  }
  gemm_panels(product, strips, t.q_stride, t.k, t.depth, t.s_stride);

  bool exact[kStrips] = {};
  for (int64_t i = 0; i < strips; ++i) {
    const Range seen = {product[i].begin, product[i].end};
    const int64_t r = r0 + i * kTileRows, row = i * kTileRows;
    if (seen.begin == seen.end) continue;
    product[i] = {t.p + row * t.p_stride, t.o + r * t.o_stride, t.factor + r, seen.begin / kDepth, operand_depth<E>(seen.end)};
    const Range span = {seen.begin / kTileCols<E> * kTileCols<E>, round_up(seen.end, kTileCols<E>)};
    Range own[kTileRows];
    for (int64_t k = 0; k < kTileRows; ++k) {
      own[k] = r + k < rows ? clip({t.visible[r + k].begin - base, t.visible[r + k].end - base}, span.begin, span.end)
                            : Range{span.begin, span.begin};
      exact[i] |=
          !values_finite && r + k < rows && (own[k].begin != product[i].begin * kDepth || own[k].end != product[i].end * kDepth);
    }
    softmax_strip<T>(score, t.s + row * t.s_stride, t.s_stride, t.p + row * t.p_stride, t.p_stride, own, span, t.m + r, t.l + r,
                     t.factor + r);
    if (!exact[i]) continue;
    product[i].end = product[i].begin;  // nothing left for the strip as a whole
    for (int64_t k = 0; k < min_of(kTileRows, rows - r); ++k) {
      gemm_row_exact(t.p + (row + k) * t.p_stride, 1, t.v, t.v_stride, own[k].begin, own[k].end, t.o + (r + k) * t.o_stride,
                     head_dim, t.factor[r + k]);
    }
  }
  gemm_strips<E, Layout::kRowMajor, Start::kScale>(product, strips, t.p_stride, t.v, t.v_stride, t.o_stride, head_dim);
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

// The keys of the block at `base`, spread over the steps that `rows` rows take with the block before.
template <class T>
FASTLM_INLINE Prefetch next_keys(const Params& p, const QueryBlock& b, const Sequence& s, Range all, int64_t base, int64_t rows) {
  constexpr int64_t kSize = sizeof(T);
  const Range keys = clip(all, base, base + kBlockKeys);
  const int64_t steps = ceil_div(rows, kSubRows);
  const int64_t count = keys.end - keys.begin;
  if (count == 0) return {};
  return {reinterpret_cast<const char*>(head_row<T>(p.k, s.batch, s.k_begin + keys.begin, b.kv_head)),
          reinterpret_cast<const char*>(head_row<T>(p.v, s.batch, s.k_begin + keys.begin, b.kv_head)),
          p.k.seq_stride * kSize,
          p.v.seq_stride * kSize,
          p.head_dim * kSize,
          count,
          ceil_div(count, steps)};
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
    Prefetch ahead = next_keys<T>(p, b, s, {all.begin, all.end}, base + kBlockKeys, padded);
    for (int64_t r = 0; r < padded; r += kSubRows) {
      ahead.step();
      attend<T>(t, score, r, rows, p.head_dim, base, finite);
    }
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
  if (memory.base == nullptr) return;
  const ForwardTile<T> tile(memory, rows, p.head_dim);
  for (int64_t i = begin; i < end; ++i) forward_block<T>(p, blocks[i], tile);
}

}  // namespace

extern const sliding_window_attention::ForwardKernels sliding_window_attention_forward;
const sliding_window_attention::ForwardKernels sliding_window_attention_forward = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
