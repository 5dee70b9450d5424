// Products of groups of rows with one weight each, the gated one with its activation, and the weighted sum of a token's experts.
// A piece is a block of rows of one weight: it is packed once and meets all rows of its group (the layer is
// that of arXiv 2409.12136, section 2). Bound by the products; groups of a few rows are bound by reading the weight.
#include "core/scratch.h"
#include "core/simd/dots.h"
#include "ops/moe_dispatch/cpu/activation.h"
#include "ops/moe_dispatch/cpu/kernels.h"
#include "ops/moe_dispatch/cpu/weight_block.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using moe_dispatch::Combine;
using moe_dispatch::GateUp;
using moe_dispatch::Groups;
using moe_dispatch::Pack;
using moe_dispatch::Product;
using moe_dispatch::Source;

template <class T>
void pack(const Pack& p, int64_t piece) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  int64_t g = 0;
  int64_t block = piece;
  for (; block >= ceil_div(p.groups.group[g].padded, kBlock); ++g) block -= ceil_div(p.groups.group[g].padded, kBlock);
  const Group& group = p.groups.group[g];
  const int64_t begin = block * kBlock;
  const int64_t end = min_of(begin + kBlock, group.padded);
  const Source& s = p.from;
  Rows<T> from{static_cast<const T*>(s.data), nullptr, s.row_stride, 1, group.end - group.begin, s.columns};
  if (s.index != nullptr) {
    from.index = s.index + group.begin;
  } else {
    from.first += group.begin * s.row_stride;
  }
  const int64_t operands = operand_depth<E>(s.columns);
  const int64_t at = group.packed - p.packed_begin;
  if (p.columns != nullptr) pack_columns<T, E>(from, static_cast<E*>(p.columns) + at * operands, begin, end);
  if (p.rows != nullptr) {
    pack_rows<T, E>(from, group.padded, static_cast<E*>(p.rows) + at * ceil_div(operands, kN) * kN, begin, end);
  }
  if (p.depths != nullptr) {
    pack_depths<T, E>(from, p.packed_rows, static_cast<E*>(p.depths) + at / depth_per_operand<E> * kN, begin, end);
  }
}

// ---- small groups -------------------------------------------------------------------------------------------------------

// Rows [row, row + kDotRows) of one expert's weight, those beyond `end` being the last one again, times tokens x[0], x[1].
template <class T>
__attribute__((noinline)) void dot_rows(const Weights& w, int64_t expert, int64_t row, int64_t end,
                                        const T* const (&x)[kDotTokens], acc_t<T> (&sums)[kDotTokens][kDotRows]) {
  const T* rows[kDotRows];
  for (int r = 0; r < kDotRows; ++r) rows[r] = element<T>(w, expert, min_of(row + r, end - 1), 0);
  if (x[1] == nullptr) {
    dots<T, 1>(rows, w.row_stride, x, w.depth, sums);
  } else {
    dots<T, 2>(rows, w.row_stride, x, w.depth, sums);
  }
  if (w.bias == nullptr) return;
  for (int r = 0; r < kDotRows; ++r) {
    const acc_t<T> bias =
        load_param<acc_t<T>>(w.bias, w.bias_dtype, expert * w.bias_expert_stride + min_of(row + r, end - 1) * w.bias_stride);
    for (auto& token : sums) token[r] += bias;
  }
}

// Two rows of the group from `row` on; the second null if there is none.
template <class T>
FASTLM_INLINE void two_rows(const Source& from, const Group& group, int64_t row, const T* (&x)[kDotTokens]) {
  for (int t = 0; t < kDotTokens; ++t) x[t] = row + t < group.end ? source_row<T>(from, row + t) : nullptr;
}

template <class T>
void small_product(const Product& p, const Group& group, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t r = begin; r < end; r += kDotRows) {
    for (int64_t row = group.begin; row < group.end; row += kDotTokens) {
      const T* x[kDotTokens];
      two_rows(p.x, group, row, x);
      A sums[kDotTokens][kDotRows] = {};
      dot_rows<T>(p.weight, group.expert, r, end, x, sums);
      for (int64_t t = 0; t < min_of(kDotTokens, group.end - row); ++t) {
        const int64_t at = (row + t) * p.out_row_stride + r;
        for (int64_t i = 0; i < min_of(kDotRows, end - r); ++i) {
          if (p.out_acc) {
            static_cast<A*>(p.out)[at + i] = sums[t][i];
          } else {
            static_cast<T*>(p.out)[at + i] = from_acc<T>(sums[t][i]);
          }
        }
      }
    }
  }
}

template <class T, class F, bool kGated>
void small_gate_up(const GateUp& p, const Group& group, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<A>;
  for (int64_t r = begin; r < end; r += kDotRows) {
    for (int64_t row = group.begin; row < group.end; row += kDotTokens) {
      const T* x[kDotTokens];
      two_rows(p.x, group, row, x);
      A gate[kDotTokens][kDotRows] = {}, up[kDotTokens][kDotRows] = {};
      dot_rows<T>(p.weight, group.expert, r, end, x, gate);
      if (kGated) dot_rows<T>(p.weight, group.expert, p.inner + r, p.inner + end, x, up);
      const int64_t count = min_of(kDotRows, end - r);
      for (int64_t t = 0; t < min_of(kDotTokens, group.end - row); ++t) {
        if (p.gate_up != nullptr) {
          T* to = static_cast<T*>(p.gate_up) + (group.kept + row - group.begin + t) * p.weight.rows + r;
          for (int64_t i = 0; i < count; ++i) to[i] = from_acc<T>(gate[t][i]);
          for (int64_t i = 0; kGated && i < count; ++i) to[p.inner + i] = from_acc<T>(up[t][i]);
        }
        for (int64_t i = 0; i < kDotRows; i += kLanes) {
          const int64_t n = min_of(kLanes, kDotRows - i);
          V v = F::value(load_upto(gate[t] + i, n));
          if (kGated) v = v * load_upto(up[t] + i, n);
          store_upto(gate[t] + i, v, n);
        }
        if (p.act_rows == nullptr) continue;
        T* to = static_cast<T*>(p.act_rows) + (row + t) * p.inner + r;
        for (int64_t i = 0; i < count; ++i) to[i] = from_acc<T>(gate[t][i]);
      }
    }
  }
}

// ---- packed groups ------------------------------------------------------------------------------------------------------

// Adds the biases of rows [first, first + count) to rows `at` .. of a block of sums.
template <class E>
void add_row_bias(const Weights& w, int64_t expert, const RowRange& range, int64_t rows, operand_acc<E>* c) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  if (w.bias == nullptr) return;
  A bias[kBlock];
  for (int64_t i = 0; i < range.count; ++i) {
    bias[i] = load_param<A>(w.bias, w.bias_dtype, expert * w.bias_expert_stride + (range.first + i) * w.bias_stride);
  }
  for (int64_t panel = 0; panel < ceil_div(rows, kN); ++panel) {
    A* to = c + panel * kBlock * kN + range.at * kN;
    for (int64_t i = 0; i < range.count; ++i) {
      const V b = broadcast<V>(bias[i]);
      for (int64_t v = 0; v < kN; v += kOperandLanes<E>) store(to + i * kN + v, load(to + i * kN + v) + b);
    }
  }
}

// The activation of `count` inner rows from `first` on, written as columns of B of the next product.
template <class E, class F, bool kGated>
void activate(const operand_acc<E>* c, int64_t first, int64_t count, int64_t rows, int64_t operands, E* act) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  constexpr int64_t kLanes = kOperandLanes<E>;
  for (int64_t panel = 0; panel < ceil_div(rows, kN); ++panel) {
    const A* gate = c + panel * kBlock * kN;
    const A* up = gate + kHalfBlock * kN;
    E* to = act + panel * kN * operands + first / depth_per_operand<E> * kN;
    const auto value = [&](int64_t i, int64_t v) {
      const V x = F::value(load(gate + i * kN + v));
      return kGated ? x * load(up + i * kN + v) : x;
    };
    if constexpr (depth_per_operand<E> == 1) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t v = 0; v < kN; v += kLanes) store(to + i * kN + v, value(i, v));
      }
    } else {
      for (int64_t i = 0; i < count; i += 2) {
        for (int64_t v = 0; v < kN; v += kLanes) {
          const VecH low = bf16_bits(value(i, v));
          const VecH high = i + 1 < count ? bf16_bits(value(i + 1, v)) : VecH{};
          store_operands(to + i / 2 * kN + v, pair_halves(low, high));
        }
      }
    }
  }
}

// The first chunk of what a piece about inner rows [begin, begin + size) of a group packs.
template <class T, bool kGated>
FASTLM_INLINE Ahead inner_rows_of_next(const GateUp& p, const NextPiece& next, int64_t size) {
  if (next.group == nullptr) return {};
  const int64_t begin = next.block * size;
  const int64_t count = min_of(size, p.inner - begin);
  const RowRange ranges[2] = {{begin, count, 0}, {p.inner + begin, count, kHalfBlock}};
  const int64_t depth = min_of(kChunk * depth_per_operand<operand_t<T>>, p.weight.depth);
  return rows_ahead<T>(p.weight, next.group->expert, ranges, kGated ? 2 : 1, 0, depth);
}

template <class T, class F, bool kGated>
void gate_up_block(const GateUp& p, const Group& group, int64_t begin, int64_t end, const NextPiece& next) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  void* scratch = thread_scratch(kProductScratch<E>);
  if (scratch == nullptr) return;
  const RowRange ranges[2] = {{begin, end - begin, 0}, {p.inner + begin, end - begin, kHalfBlock}};
  constexpr int64_t kRanges = kGated ? 2 : 1;
  const int64_t operands = operand_depth<E>(p.inner);
  const E* x = static_cast<const E*>(p.x_packed) + group.packed * operand_depth<E>(p.weight.depth);
  const Ahead ahead = inner_rows_of_next<T, kGated>(p, next, kGated ? kHalfBlock : kBlock);
  const auto use = [&](int64_t row, int64_t rows, A* c) {
    for (int64_t i = 0; i < kRanges; ++i) {
      add_row_bias<E>(p.weight, group.expert, ranges[i], rows, c);
      if (p.gate_up == nullptr) continue;
      T* to = static_cast<T*>(p.gate_up) + (group.kept + row - group.begin) * p.weight.rows + ranges[i].first;
      store_transposed<A, T, kN>(c + ranges[i].at * kN, rows, ranges[i].count, to, p.weight.rows);
    }
    if (p.act_packed == nullptr) return;
    E* act = static_cast<E*>(p.act_packed) + (group.packed + row - group.begin) * operands;
    activate<E, F, kGated>(c, begin, end - begin, rows, operands, act);
  };
  weight_times_group<T>(p.weight, group, x, ranges, kRanges, ahead, scratch, block_use<A>(use));
}

template <class T>
void gate_up(const GateUp& p, int64_t piece) {
  const int64_t size = p.gated ? kHalfBlock : kBlock;
  const int64_t blocks = ceil_div(p.inner, size);
  const Group& group = p.groups.group[piece / blocks];
  const int64_t begin = piece % blocks * size;
  const int64_t end = min_of(begin + size, p.inner);
  with_activation(p.activation, [&]<class F>() {
    if (group.small) {
      p.gated ? small_gate_up<T, F, true>(p, group, begin, end) : small_gate_up<T, F, false>(p, group, begin, end);
    } else {
      const NextPiece next(p.groups, piece, blocks);
      p.gated ? gate_up_block<T, F, true>(p, group, begin, end, next) : gate_up_block<T, F, false>(p, group, begin, end, next);
    }
  });
}

template <class T>
void product(const Product& p, int64_t piece) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t blocks = ceil_div(p.weight.rows, kBlock);
  const Group& group = p.groups.group[piece / blocks];
  const int64_t begin = piece % blocks * kBlock;
  const int64_t end = min_of(begin + kBlock, p.weight.rows);
  if (group.small) return small_product<T>(p, group, begin, end);
  void* scratch = thread_scratch(kProductScratch<E>);
  if (scratch == nullptr) return;
  const RowRange range{begin, end - begin, 0};
  const E* x = static_cast<const E*>(p.x_packed) + group.packed * operand_depth<E>(p.weight.depth);
  const NextPiece next(p.groups, piece, blocks);
  Ahead ahead{};
  if (next.group != nullptr) {
    const RowRange rows{next.block * kBlock, min_of(kBlock, p.weight.rows - next.block * kBlock), 0};
    const int64_t depth = min_of(kChunk * depth_per_operand<E>, p.weight.depth);
    ahead = rows_ahead<T>(p.weight, next.group->expert, &rows, 1, 0, depth);
  }
  const auto use = [&](int64_t row, int64_t rows, A* c) {
    add_row_bias<E>(p.weight, group.expert, range, rows, c);
    const int64_t at = row * p.out_row_stride + begin;
    if (p.out_acc) {
      store_transposed<A, A, kN>(c, rows, end - begin, static_cast<A*>(p.out) + at, p.out_row_stride);
    } else {
      store_transposed<A, T, kN>(c, rows, end - begin, static_cast<T*>(p.out) + at, p.out_row_stride);
    }
  };
  weight_times_group<T>(p.weight, group, x, &range, 1, ahead, scratch, block_use<A>(use));
}

template <class T>
void combine(const Combine& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<A>;
  for (int64_t t = begin; t < end; ++t) {
    const A* rows[8];
    A weight[8];
    int64_t count = 0;
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int64_t row = p.inv[t * p.top_k + j];
      if (row >= p.num_rows) continue;
      rows[count] = static_cast<const A*>(p.rows) + row * p.columns;
      weight[count++] = p.weights == nullptr ? A(1) : static_cast<const A*>(p.weights)[t * p.top_k + j];
    }
    T* y = static_cast<T*>(p.y) + t * p.columns;
    for (int64_t c = 0; c < p.columns; c += kLanes) {
      V sum = {};
      for (int64_t j = 0; j < count; ++j) sum = fma(broadcast<V>(weight[j]), load_upto(rows[j] + c, p.columns - c), sum);
      store_upto(y + c, sum, p.columns - c);
    }
  }
}

template <class T>
constexpr int64_t columns_of = kPackedColumns<operand_t<T>>;
template <class T>
constexpr int64_t elements_of = depth_per_operand<operand_t<T>>;
template <class T>
constexpr int64_t bytes_of = sizeof(operand_t<T>);

}  // namespace

extern const moe_dispatch::ForwardKernels moe_dispatch_forward;
const moe_dispatch::ForwardKernels moe_dispatch_forward = {
    {columns_of<float>, columns_of<bfloat16>, columns_of<float16>, columns_of<double>},
    {elements_of<float>, elements_of<bfloat16>, elements_of<float16>, elements_of<double>},
    {bytes_of<float>, bytes_of<bfloat16>, bytes_of<float16>, bytes_of<double>},
    {pack<float>, pack<bfloat16>, pack<float16>, pack<double>},
    {gate_up<float>, gate_up<bfloat16>, gate_up<float16>, gate_up<double>},
    {product<float>, product<bfloat16>, product<float16>, product<double>},
    {combine<float>, combine<bfloat16>, combine<float16>, combine<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
