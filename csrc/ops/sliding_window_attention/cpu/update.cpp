// Sliding-window attention, decoding: m new tokens per row against a ring of keys and values (slot = position mod ring).
// Keys and values are read as they lie, converted in registers and used for all heads of a group: one query at a time, so that
// every query touches exactly the positions it sees. Bound by the memory that holds the caches.
#include "ops/sliding_window_attention/cpu/kernels.h"
#include "ops/sliding_window_attention/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using sliding_window_attention::kSplit;
using sliding_window_attention::UpdateParams;
using sliding_window_attention::UpdateWorkspace;

constexpr int64_t kAheadRows = 8;    // rows between a prefetch and its use: keys of one head lie far apart
constexpr int64_t kValueBlock = 64;  // values that stay in the first-level cache while the heads of a group pass

// ---- new tokens ---------------------------------------------------------------------------------------------------

// x (K) turned by the angles of `position` (half-split pairs), times `factor`.
template <class A, class T, class Store>
FASTLM_INLINE void turn(const UpdateParams& p, const T* x, int64_t position, A factor, const Store& put) {
  const int64_t half = p.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const A cos = load_param<A>(p.rotary_cos, p.rotary_dtype, position * p.cos_row_stride + i * p.cos_stride);
    const A sin = load_param<A>(p.rotary_sin, p.rotary_dtype, position * p.sin_row_stride + i * p.sin_stride);
    const A a = to_acc(x[i]), b = to_acc(x[i + half]);
    put(i, (a * cos - b * sin) * factor);
    put(i + half, (b * cos + a * sin) * factor);
  }
}

template <class T>
void write(const UpdateParams& p, const UpdateWorkspace& w, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.num_new, t = item % p.num_new;
    const int64_t position = p.cache_seqlens[b] + t, slot = position % p.ring;
    const bool turned = p.rotary_cos != nullptr;
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const T* k = head_row<T>(p.k, b, t, h);
      T* to = head_row<T>(p.k_cache, b, slot, h);
      if (turned) {
        turn<A>(p, k, position, A(1), [&](int64_t i, A x) { to[i] = from_acc<T>(x); });
      } else {
        __builtin_memcpy(to, k, static_cast<size_t>(p.head_dim) * sizeof(T));
      }
      __builtin_memcpy(head_row<T>(p.v_cache, b, slot, h), head_row<T>(p.v, b, t, h),
                       static_cast<size_t>(p.head_dim) * sizeof(T));
    }
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const T* q = head_row<T>(p.q, b, t, h);
      A* to = static_cast<A*>(w.queries) + ((b * p.num_new + t) * p.num_heads + h) * w.columns;
      const A scale = static_cast<A>(p.softmax_scale);
      if (turned) {
        turn<A>(p, q, position, scale, [&](int64_t i, A x) { to[i] = x; });
      } else {
        for (int64_t i = 0; i < p.head_dim; ++i) to[i] = to_acc(q[i]) * scale;
      }
      for (int64_t i = p.head_dim; i < w.columns; ++i) to[i] = A(0);
    }
  }
}

// ---- attention ----------------------------------------------------------------------------------------------------

template <class T>
FASTLM_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 3);
}

// scores[h][j] = q_h . k_j for kHeads queries and `n` keys, `stride` elements apart; kKeys keys at a time share a query's load.
template <class T, int kHeads>
FASTLM_INLINE void score_keys(const acc_t<T>* q, int64_t columns, const T* k, int64_t stride, int64_t n, int64_t head_dim,
                              acc_t<T>* scores) {
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr int kKeys = kHeads == 4 ? 2 : 4;
  for (int64_t j = 0; j < n; j += kKeys) {
    V sum[kHeads][kKeys] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      key[i] = k + min_of(j + i, n - 1) * stride;
      if (j + i + kAheadRows < n) prefetch_row(k + (j + i + kAheadRows) * stride, head_dim);
    }
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) {
        const V x = load(key[i] + d);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) sum[h][i] = fma(load(q + h * columns + d), x, sum[h][i]);
      }
    }
    for (; d < head_dim; d += kLanes) {
      for (int i = 0; i < kKeys; ++i) {
        const V x = load_partial(key[i] + d, head_dim - d);
        for (int h = 0; h < kHeads; ++h) sum[h][i] = fma(load(q + h * columns + d), x, sum[h][i]);
      }
    }
    for (int i = 0; i < kKeys && j + i < n; ++i) {
      for (int h = 0; h < kHeads; ++h) scores[h * kSplit + j + i] = reduce_add(sum[h][i]);
    }
  }
}

// o[h] += sum_j weights[h][j] v_j.
template <class T, int kHeads>
FASTLM_INLINE void add_values(const acc_t<T>* weights, const T* v, int64_t stride, int64_t n, int64_t head_dim, acc_t<T>* o,
                              int64_t columns) {
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr int kVecs = 8 / kHeads;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= head_dim; c += kVecs * kLanes) {
    V sum[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kVecs; ++i) sum[h][i] = load(o + h * columns + c + i * kLanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      if (j + kAheadRows < n) prefetch_row(v + (j + kAheadRows) * stride + c, kVecs * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        const V x = load(v + j * stride + c + i * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) sum[h][i] = fma(broadcast<V>(weights[h * kSplit + j]), x, sum[h][i]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kVecs; ++i) store(o + h * columns + c + i * kLanes, sum[h][i]);
    }
  }
  for (; c < head_dim; c += kLanes) {
    for (int h = 0; h < kHeads; ++h) {
      V sum = load(o + h * columns + c);
      for (int64_t j = 0; j < n; ++j) {
        sum = fma(broadcast<V>(weights[h * kSplit + j]), load_upto(v + j * stride + c, head_dim - c), sum);
      }
      store(o + h * columns + c, sum);
    }
  }
}

// Scores of `n` keys become weights; returns their largest score and their sum.
template <class T>
FASTLM_INLINE void weigh(acc_t<T>* scores, int64_t n, acc_t<T>* result) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  constexpr A kInf = static_cast<A>(__builtin_inf());
  for (int64_t j = n; j < round_up(n, kLanes); ++j) scores[j] = -kInf;
  V top = broadcast<V>(-kInf);
  for (int64_t j = 0; j < n; j += kLanes) top = max(load(scores + j), top);
  const A largest = reduce_max(top);
  const V base = broadcast<V>(largest == -kInf ? A(0) : largest);
  V sum = zero<V>();
  for (int64_t j = 0; j < n; j += kLanes) {
    const V weight = exp2_nonpositive((load(scores + j) - base) * static_cast<A>(kLog2eExact));
    sum += weight;
    store(scores + j, weight);
  }
  result[0] = largest;
  result[1] = reduce_add(sum);
}

// Positions that token t of a row sees.
FASTLM_INLINE Range visible_positions(const UpdateParams& p, int64_t seen, int64_t t) {
  const int64_t oldest = max_of(max_of(seen + p.num_new - p.ring, seen + t - p.left), 0);
  return {oldest, seen + t + 1};
}

// kHeads queries of one token against positions [keys.begin, keys.end), at most kSplit.
template <class T, int kHeads>
void attend_heads(const UpdateParams& p, int64_t b, int64_t kv_head, Range keys, const acc_t<T>* q, acc_t<T>* o,
                  acc_t<T>* weights, int64_t columns) {
  alignas(64) acc_t<T> scores[kHeads * kSplit];
  const int64_t slot = keys.begin % p.ring;
  const int64_t n = keys.end - keys.begin, first = min_of(n, p.ring - slot);  // the rest begins anew at slot 0
  const T* k = head_row<T>(p.k_cache, b, 0, kv_head);
  const T* v = head_row<T>(p.v_cache, b, 0, kv_head);
  const int64_t k_stride = p.k_cache.seq_stride, v_stride = p.v_cache.seq_stride;
  score_keys<T, kHeads>(q, columns, k + slot * k_stride, k_stride, first, p.head_dim, scores);
  score_keys<T, kHeads>(q, columns, k, k_stride, n - first, p.head_dim, scores + first);
  for (int h = 0; h < kHeads; ++h) weigh<T>(scores + h * kSplit, n, weights + 2 * h);
  for (int64_t i = 0; i < kHeads * columns; ++i) o[i] = acc_t<T>(0);
  for (int64_t j = 0; j < first; j += kValueBlock) {
    add_values<T, kHeads>(scores + j, v + (slot + j) * v_stride, v_stride, min_of(kValueBlock, first - j), p.head_dim, o,
                          columns);
  }
  for (int64_t j = first; j < n; j += kValueBlock) {
    add_values<T, kHeads>(scores + j, v + (j - first) * v_stride, v_stride, min_of(kValueBlock, n - j), p.head_dim, o, columns);
  }
}

template <class T>
void attend(const UpdateParams& p, const UpdateWorkspace& w, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t group = p.num_heads / p.num_kv_heads, rows = p.num_new * group;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t split = item % w.splits, kv_head = item / w.splits % p.num_kv_heads, b = item / w.splits / p.num_kv_heads;
    const int64_t seen = p.cache_seqlens[b];
    const int64_t at = (visible_positions(p, seen, 0).begin / kSplit + split) * kSplit;
    for (int64_t t = 0; t < p.num_new; ++t) {
      const Range keys = clip(visible_positions(p, seen, t), at, at + kSplit);
      const A* q = static_cast<const A*>(w.queries) + ((b * p.num_new + t) * p.num_heads + kv_head * group) * w.columns;
      A* o = static_cast<A*>(w.sums) + (item * rows + t * group) * w.columns;
      A* weights = static_cast<A*>(w.weights) + (item * rows + t * group) * 2;
      if (keys.begin == keys.end) {
        for (int64_t g = 0; g < group; ++g) weights[2 * g + 1] = A(0);
        continue;
      }
      for (int64_t g = 0; g < group;) {
        const int64_t left = group - g;
        const int64_t step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto heads = step == 4 ? attend_heads<T, 4> : step == 2 ? attend_heads<T, 2> : attend_heads<T, 1>;
        heads(p, b, kv_head, keys, q + g * w.columns, o + g * w.columns, weights + 2 * g, w.columns);
        g += step;
      }
    }
  }
}

// ---- the pieces together ------------------------------------------------------------------------------------------

template <class T>
void merge(const UpdateParams& p, const UpdateWorkspace& w, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const int64_t group = p.num_heads / p.num_kv_heads, rows = p.num_new * group;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.num_kv_heads, kv_head = item % p.num_kv_heads;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = row / group;
      const int64_t first = visible_positions(p, p.cache_seqlens[b], 0).begin / kSplit;
      const Range seen = visible_positions(p, p.cache_seqlens[b], t);
      const Range splits = {seen.begin / kSplit - first, (seen.end - 1) / kSplit - first + 1};
      const auto at = [&](int64_t split) { return (item * w.splits + split) * rows + row; };
      const A* weights = static_cast<const A*>(w.weights);
      A largest = weights[2 * at(splits.begin)];
      for (int64_t i = splits.begin + 1; i < splits.end; ++i) {
        const A next = weights[2 * at(i)];
        largest = next > largest ? next : largest;
      }
      const A base = largest == static_cast<A>(-__builtin_inf()) ? A(0) : largest;
      const auto factor = [&](int64_t split) {
        return exp2_nonpositive(broadcast<V>((weights[2 * at(split)] - base) * static_cast<A>(kLog2eExact)))[0];
      };
      A total = A(0);
      for (int64_t i = splits.begin; i < splits.end; ++i) total += weights[2 * at(i) + 1] * factor(i);
      const A inverse = total == A(0) ? A(0) : A(1) / total;
      T* out = head_row<T>(p.out, b, t, kv_head * group + row % group);
      for (int64_t n = 0; n < p.head_dim; n += kLanes) {
        V sum = zero<V>();
        for (int64_t i = splits.begin; i < splits.end; ++i) {
          sum = fma(load(static_cast<const A*>(w.sums) + at(i) * w.columns + n), broadcast<V>(factor(i)), sum);
        }
        store_upto(out + n, sum * inverse, p.head_dim - n);
      }
    }
  }
}

}  // namespace

extern const sliding_window_attention::UpdateKernels sliding_window_attention_update;
const sliding_window_attention::UpdateKernels sliding_window_attention_update = {
    {write<float>, write<bfloat16>, write<float16>, write<double>},
    {attend<float>, attend<bfloat16>, attend<float16>, attend<double>},
    {merge<float>, merge<bfloat16>, merge<float16>, merge<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
