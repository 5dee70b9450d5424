// Sliding-window attention, backward. With P = exp(s - lse) recomputed from q, k and the saved lse, and D_i = dout_i . out_i -
// dlse_i:
//   dv_j = sum_i P_ij dout_i,  dS_ij = P_ij (dout_i . v_j - D_i) * ds/d(raw),  dq_i = scale sum_j dS_ij k_j,  dk_j = scale sum_i
//   dS_ij q_i
// (Dao et al., arXiv 2205.14135, section 3). One pass over the visible pairs, five products per pair: a chunk of keys walks, key
// block by key block, over the blocks of queries that see it; dk and dv stay in the cache, dq is added to a buffer that no other
// chunk touches at the same place (kernels.h). Bound by the multiply-add units.
//
// Masked pairs have weights that are replaced by zero; where a masked operand is not finite, rows are finished one by one.
#include "ops/sliding_window_attention/cpu/kernels.h"
#include "ops/sliding_window_attention/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using sliding_window_attention::BackwardParams;
using sliding_window_attention::KeyChunk;
using sliding_window_attention::kKeyBlock;
using sliding_window_attention::PartialLayout;
using sliding_window_attention::QueryBlock;

constexpr int64_t kSubRows = 24;  // rows, or keys, whose weights stay in the first-level cache
constexpr int64_t kStrips = kSubRows / kTileRows;

template <class T>
struct BackwardTile {
  using E = operand_t<T>;
  using A = acc_t<T>;
  static constexpr bool kPairs = depth_per_operand<E> == 2;

  int64_t depth;  // operands of a head
  int64_t row_stride, across_stride, sum_stride, s_stride, ds_stride;
  E *k_columns, *v_columns;      // panels (kKeyBlock / kTileCols, K, kTileCols)
  E* k_across;                   // (kKeyBlock, K), depth-major
  A *dk, *dv;                    // (kKeyBlock, K)
  E *q, *dout;                   // (rows, K), row-major
  E *q_across, *dout_across;     // (rows, K), depth-major: the same memory but for pairs
  A *s, *dp;                     // (rows, kKeyBlock): raw scores, then P; dout . v, then dS
  E *p_across, *ds_across, *ds;  // P and dS as operands: the same memory but for pairs
  A *lse, *delta;                // per row; lse in units of log2
  Range* visible;                // per row, keys of the block

  BackwardTile(Carve& memory, int64_t rows, int64_t head_dim) {
    depth = operand_depth<E>(head_dim);
    row_stride = padded_stride<E>(depth);
    across_stride = padded_stride<E>(head_dim);
    sum_stride = padded_stride<A>(head_dim);
    s_stride = padded_stride<A>(kKeyBlock);
    k_columns = memory.take<E>(kKeyBlock * depth);
    v_columns = memory.take<E>(kKeyBlock * depth);
    k_across = memory.take<E>(operand_depth<E>(kKeyBlock) * across_stride);
    dk = memory.take<A>(kKeyBlock * sum_stride);
    dv = memory.take<A>(kKeyBlock * sum_stride);
    q = memory.take<E>(rows * row_stride);
    dout = memory.take<E>(rows * row_stride);
    s = memory.take<A>(rows * s_stride);
    dp = memory.take<A>(rows * s_stride);
    if constexpr (kPairs) {
      ds_stride = padded_stride<E>(kKeyBlock / 2);
      q_across = memory.take<E>(operand_depth<E>(rows) * across_stride);
      dout_across = memory.take<E>(operand_depth<E>(rows) * across_stride);
      p_across = memory.take<E>(operand_depth<E>(rows) * s_stride);
      ds_across = memory.take<E>(operand_depth<E>(rows) * s_stride);
      ds = memory.take<E>(rows * ds_stride);
    } else {
      ds_stride = s_stride;
      q_across = q;
      dout_across = dout;
      p_across = s;
      ds_across = ds = dp;
    }
    lse = memory.take<A>(rows);
    delta = memory.take<A>(rows);
    visible = memory.take<Range>(rows);
  }
};

// One strip: columns [span.begin, span.end) of raw scores and dout . v become P and dS; everything row k does not see becomes
// zero.
template <class T>
FASTLM_INLINE void weights_strip(const Scoring& score, acc_t<T>* s, acc_t<T>* dp, int64_t stride, const Range* own, Range span,
                                 const acc_t<T>* lse, const acc_t<T>* delta) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const V c = broadcast<V>(static_cast<A>(score.unit * kLog2eExact));
  const A inverse_cap = score.softcap > 0 ? static_cast<A>(1.0 / score.softcap) : A(0);
  for (int64_t k = 0; k < kTileRows; ++k, s += stride, dp += stride) {
    const V minus_lse = broadcast<V>(-lse[k]), d = broadcast<V>(delta[k]);
    for (int64_t j = span.begin; j < span.end; j += lanes_of<T>) {
      V x = load(s + j);
      if (score.transform) x = score.apply(x);
      const V p = exp2_nonpositive(fma(x, c, minus_lse));
      V ds = p * (load(dp + j) - d);
      if (score.softcap > 0) {
        const V t = x * inverse_cap;
        ds *= A(1) - t * t;
      }
      store(s + j, p);
      store(dp + j, ds);
    }
    for (int64_t j = 0; j < own[k].begin; ++j) s[j] = dp[j] = A(0);
    for (int64_t j = own[k].end; j < kKeyBlock; ++j) s[j] = dp[j] = A(0);
  }
}

// Rows [r0, r0 + kSubRows): P, dS and their share of dq, whose first row is `dq`.
template <class T>
void weigh(const BackwardTile<T>& t, const Scoring& score, int64_t r0, int64_t padded, int64_t head_dim, bool keys_finite,
           acc_t<T>* dq, int64_t dq_stride) {
  using E = operand_t<T>;
  constexpr int64_t kDepth = depth_per_operand<E>;
  Strip<E> product[kStrips];
  Strip<E> gradient[kStrips];
  const int64_t strips = min_of(kStrips, (padded - r0) / kTileRows);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t r = r0 + i * kTileRows;
    Range seen = {kKeyBlock, 0};
    for (int64_t k = 0; k < kTileRows; ++k) {
      const Range own = t.visible[r + k];
      if (own.begin < own.end) seen = {min_of(seen.begin, own.begin), max_of(seen.end, own.end)};
    }
    product[i] = {t.q + r * t.row_stride, t.s + r * t.s_stride, nullptr, seen.begin, seen.end};
    gradient[i] = {t.dout + r * t.row_stride, t.dp + r * t.s_stride, nullptr, seen.begin, seen.end};
  }
  gemm_panels(product, strips, t.row_stride, t.k_columns, t.depth, t.s_stride);
  gemm_panels(gradient, strips, t.row_stride, t.v_columns, t.depth, t.s_stride);

  for (int64_t i = 0; i < strips; ++i) {
    const int64_t r = r0 + i * kTileRows;
    const Range seen = {product[i].begin, product[i].end};
    if (seen.begin >= seen.end) continue;
    weights_strip<T>(score, product[i].c, gradient[i].c, t.s_stride, t.visible + r,
                     {seen.begin / kTileCols<E> * kTileCols<E>, round_up(seen.end, kTileCols<E>)}, t.lse + r, t.delta + r);
    if constexpr (BackwardTile<T>::kPairs) {
      const int64_t pair = r / 2;
      for (int64_t k = 0; k < kTileRows; ++k) {
        convert_row(t.dp + (r + k) * t.s_stride, t.ds + (r + k) * t.ds_stride, kKeyBlock);
      }
      convert_across(t.s + r * t.s_stride, t.s_stride, t.p_across + pair * t.s_stride, t.s_stride, kTileRows / 2, kKeyBlock);
      convert_across(t.dp + r * t.s_stride, t.s_stride, t.ds_across + pair * t.s_stride, t.s_stride, kTileRows / 2, kKeyBlock);
    }
    product[i] = {t.ds + r * t.ds_stride, dq + r * dq_stride, nullptr, seen.begin / kDepth, operand_depth<E>(seen.end)};
    bool exact = false;
    for (int64_t k = 0; k < kTileRows && !keys_finite; ++k) {
      const Range own = t.visible[r + k];
      exact |= own.begin != product[i].begin * kDepth || own.end != product[i].end * kDepth;
    }
    if (!exact) continue;
    product[i].end = product[i].begin;  // nothing left for the strip as a whole
    for (int64_t k = 0; k < kTileRows; ++k) {
      gemm_row_exact(t.ds + (r + k) * t.ds_stride, 1, t.k_across, t.across_stride, t.visible[r + k].begin, t.visible[r + k].end,
                     dq + (r + k) * dq_stride, head_dim, acc_t<T>(1));
    }
  }
  gemm_strips<E, Layout::kRowMajor, Start::kAdd>(product, strips, t.ds_stride, t.k_across, t.across_stride, dq_stride, head_dim);
}

// dsum (keys, K) += weights^T (rows, keys) * x (rows, K); key j is seen by the rows seen[j].
template <class E>
void add_to_keys(const E* weights, int64_t weights_stride, const E* x, int64_t x_stride, const Range* seen, int64_t num_keys,
                 int64_t head_dim, bool x_finite, operand_acc<E>* dsum, int64_t dsum_stride) {
  constexpr int64_t kDepth = depth_per_operand<E>;
  for (int64_t j0 = 0; j0 < num_keys; j0 += kSubRows) {
    Strip<E> product[kStrips];
    const int64_t strips = min_of(kStrips, ceil_div(num_keys - j0, kTileRows));
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t j = j0 + i * kTileRows, last = min_of(j + kTileRows, num_keys) - 1;
      product[i] = {weights + j, dsum + j * dsum_stride, nullptr, 0, 0};
      const Range rows = {seen[j].begin, seen[last].end};
      if (rows.begin >= rows.end) continue;
      product[i].begin = rows.begin / kDepth;
      product[i].end = operand_depth<E>(rows.end);
      bool exact = false;
      for (int64_t k = j; k <= last && !x_finite; ++k) {
        exact |= seen[k].begin != product[i].begin * kDepth || seen[k].end != product[i].end * kDepth;
      }
      if (!exact) continue;
      product[i].end = product[i].begin;
      for (int64_t k = j; k <= last; ++k) {
        gemm_row_exact(weights + k, weights_stride, x, x_stride, seen[k].begin, seen[k].end, dsum + k * dsum_stride, head_dim,
                       operand_acc<E>(1));
      }
    }
    gemm_strips<E, Layout::kColumnMajor, Start::kAdd>(product, strips, weights_stride, x, x_stride, dsum_stride, head_dim);
  }
}

// Queries [i0, i1) against the packed block of `num_keys` keys at position `base`; dq: their rows in the partial buffer.
template <class T>
void backward_block(const BackwardParams& p, const Sequence& s, int64_t kv_head, const BackwardTile<T>& t, const Scoring& score,
                    int64_t base, int64_t num_keys, bool keys_finite, int64_t i0, int64_t i1, acc_t<T>* dq, int64_t dq_stride) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t rows = (i1 - i0) * group, padded = round_up(rows, kTileRows);
  const int64_t width = round_up(BackwardTile<T>::kPairs ? t.depth : p.head_dim, lanes_of<T>);
  auto q_probe = zero<vec_t<T>>(), dout_probe = q_probe;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t i = min_of(i0 + r / group, i1 - 1), head = kv_head * group + r % group;
    const int64_t real = r < rows ? p.head_dim : 0;
    pack_row<E>(head_row<T>(p.q, s.batch, s.q_begin + i, head), real, t.q + r * t.row_stride, width, q_probe);
    pack_row<E>(head_row<T>(p.dout, s.batch, s.q_begin + i, head), real, t.dout + r * t.row_stride, width, dout_probe);
    const int64_t at = s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_begin + i;
    const Range seen = visible_keys(p, s, i);
    t.visible[r] = r < rows ? clip({seen.begin - base, seen.end - base}, 0, num_keys) : Range{0, 0};
    t.lse[r] = static_cast<const A*>(p.lse)[at] * static_cast<A>(kLog2eExact);
    t.delta[r] = static_cast<const A*>(p.row_delta)[at];
  }
  if constexpr (BackwardTile<T>::kPairs) {
    const auto* q = reinterpret_cast<const bfloat16*>(t.q);
    const auto* dout = reinterpret_cast<const bfloat16*>(t.dout);
    const int64_t columns = round_up(p.head_dim, lanes_of<T>);
    auto unused = zero<vec_t<T>>();
    pack_depths<E>(q, 2 * t.row_stride, 0, padded, p.head_dim, t.q_across, t.across_stride, columns, unused);
    pack_depths<E>(dout, 2 * t.row_stride, 0, padded, p.head_dim, t.dout_across, t.across_stride, columns, unused);
  }
  for (int64_t r = 0; r < padded; r += kSubRows) {
    weigh<T>(t, score, r, padded, p.head_dim, keys_finite, dq, dq_stride);
  }
  Range seen[kKeyBlock];
  for (int64_t j = 0; j < num_keys; ++j) {
    const Range queries = clip(visible_queries(p, s, base + j), i0, i1);
    seen[j] = {(queries.begin - i0) * group, (queries.end - i0) * group};
  }
  add_to_keys<E>(t.p_across, t.s_stride, t.dout_across, t.across_stride, seen, num_keys, p.head_dim, !probe_found(dout_probe),
                 t.dv, t.sum_stride);
  add_to_keys<E>(t.ds_across, t.s_stride, t.q_across, t.across_stride, seen, num_keys, p.head_dim, !probe_found(q_probe), t.dk,
                 t.sum_stride);
}

template <class A>
FASTLM_INLINE A* partial_block(const PartialLayout& l, const Params& p, int64_t partial, int64_t kv_head, int64_t block) {
  return static_cast<A*>(l.ptr) + ((partial * p.num_kv_heads + kv_head) * l.num_blocks + block) * l.rows * l.columns;
}

template <class T>
void backward_chunk(const BackwardParams& p, const PartialLayout& l, const KeyChunk& chunk, const BackwardTile<T>& t) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const Sequence& s = p.sequences[chunk.sequence];
  const Scoring score(p);
  const auto blocks_of = [&](int64_t first_key, int64_t last_key) -> Range {
    const Range queries = {visible_queries(p, s, first_key).begin, visible_queries(p, s, last_key).end};
    if (queries.begin >= queries.end) return {0, 0};
    return {queries.begin / l.queries_per_block, ceil_div(queries.end, l.queries_per_block)};
  };
  const auto partial = [&](int64_t block) {
    return partial_block<A>(l, p, chunk.partial, chunk.kv_head, l.first_block[chunk.sequence] + block);
  };
  const Range touched = blocks_of(chunk.begin, chunk.end - 1);
  for (int64_t b = touched.begin; b < touched.end; ++b) {
    __builtin_memset(partial(b), 0, static_cast<size_t>(l.rows * l.columns) * sizeof(A));
  }
  for (int64_t base = chunk.begin; base < chunk.end; base += kKeyBlock) {
    const int64_t keys = min_of(kKeyBlock, chunk.end - base);
    const Range blocks = blocks_of(base, base + keys - 1);
    __builtin_memset(t.dk, 0, static_cast<size_t>(kKeyBlock * t.sum_stride) * sizeof(A));
    __builtin_memset(t.dv, 0, static_cast<size_t>(kKeyBlock * t.sum_stride) * sizeof(A));
    bool finite = true;
    if (blocks.begin < blocks.end) {
      const T* k = head_row<T>(p.k, s.batch, s.k_begin + base, chunk.kv_head);
      const T* v = head_row<T>(p.v, s.batch, s.k_begin + base, chunk.kv_head);
      auto probe = zero<vec_t<T>>();
      pack_columns<E>(k, p.k.seq_stride, 0, keys, p.head_dim, t.k_columns);
      pack_columns<E>(v, p.v.seq_stride, 0, keys, p.head_dim, t.v_columns);
      pack_depths<E>(k, p.k.seq_stride, 0, keys, p.head_dim, t.k_across, t.across_stride, round_up(p.head_dim, kLanes), probe);
      finite = !probe_found(probe);
    }
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t i0 = b * l.queries_per_block;
      backward_block<T>(p, s, chunk.kv_head, t, score, base, keys, finite, i0, min_of(i0 + l.queries_per_block, s.q_len),
                        partial(b), l.columns);
    }
    for (int64_t j = 0; j < keys; ++j) {
      T* dk = head_row<T>(p.dk, s.batch, s.k_begin + base + j, chunk.kv_head);
      T* dv = head_row<T>(p.dv, s.batch, s.k_begin + base + j, chunk.kv_head);
      for (int64_t n = 0; n < p.head_dim; n += kLanes) {
        store_upto(dk + n, load(t.dk + j * t.sum_stride + n) * static_cast<A>(p.softmax_scale), p.head_dim - n);
        store_upto(dv + n, load(t.dv + j * t.sum_stride + n), p.head_dim - n);
      }
    }
  }
}

template <class T>
void backward_chunks(const BackwardParams& p, const PartialLayout& l, const KeyChunk* chunks, int64_t begin, int64_t end) {
  Carve count{nullptr};
  BackwardTile<T> size(count, l.rows, p.head_dim);
  Carve memory{static_cast<char*>(thread_scratch(count.used))};
  if (memory.base == nullptr) return;
  const BackwardTile<T> tile(memory, l.rows, p.head_dim);
  for (int64_t i = begin; i < end; ++i) backward_chunk<T>(p, l, chunks[i], tile);
}

// dout . out of as many rows as a vector has lanes, summed in the order in which a tile sums dout . v: for a row that sees one
// key, whose out is that key's value, both are the same number, and its dS is exactly zero.
template <class T>
FASTLM_INLINE vec_t<T> dot_rows(const T* const* dout, const T* const* out, int64_t n) {
  using E = operand_t<T>;
  constexpr int64_t kLanes = lanes_of<T>, kDepth = depth_per_operand<E>;
  vec_t<T> sum = zero<vec_t<T>>();
  for (int64_t d = 0; d < operand_depth<E>(n); d += kLanes) {
    vec_t<T> a[kLanes], b[kLanes];  // bits are moved, not read: pairs may pose as floats
    for (int64_t i = 0; i < kLanes; ++i) {
      a[i] = (vec_t<T>)load_source<E>(dout[i] + d * kDepth, n - d * kDepth);
      b[i] = (vec_t<T>)load_source<E>(out[i] + d * kDepth, n - d * kDepth);
    }
    transpose(a);
    transpose(b);
    const int64_t steps = min_of(kLanes, operand_depth<E>(n) - d);
    for (int64_t i = 0; i < steps; ++i) sum = multiply_add((operand_vec<E>)a[i], (operand_vec<E>)b[i], sum);
  }
  return sum;
}

template <class T>
void row_delta(const BackwardParams& p, const QueryBlock* blocks, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t b = begin; b < end; ++b) {
    const QueryBlock& block = blocks[b];
    const Sequence& s = p.sequences[block.sequence];
    const int64_t rows = (block.end - block.begin) * group;
    for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
      const T* dout[kLanes];
      const T* out[kLanes];
      const auto position = [&](int64_t r) { return s.q_begin + block.begin + r / group; };
      const auto head = [&](int64_t r) { return block.kv_head * group + r % group; };
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = min_of(r0 + i, rows - 1);
        dout[i] = head_row<T>(p.dout, s.batch, position(r), head(r));
        out[i] = head_row<T>(p.out, s.batch, position(r), head(r));
      }
      const auto delta = dot_rows<T>(dout, out, p.head_dim);
      for (int64_t i = 0; i < kLanes && r0 + i < rows; ++i) {
        const int64_t r = r0 + i;
        const int64_t at = s.batch * p.dlse_batch_stride + head(r) * p.dlse_head_stride + position(r) * p.dlse_seq_stride;
        const A dlse = p.dlse == nullptr ? A(0) : static_cast<const A*>(p.dlse)[at];
        static_cast<A*>(p.row_delta)[s.batch * p.lse_batch_stride + head(r) * p.lse_head_stride + position(r)] = delta[i] - dlse;
      }
    }
  }
}

template <class T>
void reduce_queries(const BackwardParams& p, const PartialLayout& l, const QueryBlock* blocks, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t b = begin; b < end; ++b) {
    const QueryBlock& block = blocks[b];
    const Sequence& s = p.sequences[block.sequence];
    const int64_t number = l.first_block[block.sequence] + block.begin / l.queries_per_block;
    const int64_t keys = l.chunk_keys[block.sequence];
    // The chunks that touched this block, in order.
    const Range seen = {visible_keys(p, s, block.begin).begin, visible_keys(p, s, block.end - 1).end};
    const int64_t first = seen.begin / keys, last = seen.begin < seen.end ? (seen.end - 1) / keys : first - 1;
    for (int64_t row = 0; row < (block.end - block.begin) * group; ++row) {
      T* dq = head_row<T>(p.dq, s.batch, s.q_begin + block.begin + row / group, block.kv_head * group + row % group);
      for (int64_t n = 0; n < p.head_dim; n += lanes_of<T>) {
        auto sum = zero<vec_t<T>>();
        for (int64_t c = first; c <= last; ++c) {
          sum += load(partial_block<A>(l, p, c % l.num_partials, block.kv_head, number) + row * l.columns + n);
        }
        store_upto(dq + n, sum * static_cast<A>(p.softmax_scale), p.head_dim - n);
      }
    }
  }
}

}  // namespace

extern const sliding_window_attention::BackwardKernels sliding_window_attention_backward;
const sliding_window_attention::BackwardKernels sliding_window_attention_backward = {
    {row_delta<float>, row_delta<bfloat16>, row_delta<float16>, row_delta<double>},
    {backward_chunks<float>, backward_chunks<bfloat16>, backward_chunks<float16>, backward_chunks<double>},
    {reduce_queries<float>, reduce_queries<bfloat16>, reduce_queries<float16>, reduce_queries<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
