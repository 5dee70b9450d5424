// Gradients of products of groups of rows, of the activation between two of them, and of what each pick counts. Every operand
// lies in memory as one of the products wants it, or has its rows interleaved in pairs: nothing is transposed. Sums of a weight's
// gradient run over all rows of an expert in the accumulation type and are rounded once. Bound by the products.
#include "core/scratch.h"
#include "ops/moe_dispatch/cpu/activation.h"
#include "ops/moe_dispatch/cpu/kernels.h"
#include "ops/moe_dispatch/cpu/weight_block.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using moe_dispatch::BiasGradient;
using moe_dispatch::GateBackward;
using moe_dispatch::Outer;
using moe_dispatch::PickGradient;
using moe_dispatch::RowProduct;
using moe_dispatch::Source;

// Where the results of one row and a vector of columns go: rows of A, and pairs of rows along the depth.
template <class E>
struct Layouts {
  using V = vec_t<operand_acc<E>>;
  static constexpr int64_t kN = kPackedColumns<E>;
  E* rows;  // of the group: (k / N, padded, N)
  int64_t padded;
  E* depths;  // of the group: (columns / N, packed_rows in operands, N)
  int64_t operand_rows;

  // Rows `row` and `row + 1` of the group; `second` is 0 where there is no such row.
  FASTLM_INLINE void write(int64_t row, int64_t column, V first, V second, bool has_second) const {
    if constexpr (depth_per_operand<E> == 1) {
      if (rows != nullptr) store(rows + (column / kN * padded + row) * kN + column % kN, first);
      if (depths != nullptr) store(depths + (column / kN * operand_rows + row) * kN + column % kN, first);
      if (!has_second) return;
      if (rows != nullptr) store(rows + (column / kN * padded + row + 1) * kN + column % kN, second);
      if (depths != nullptr) store(depths + (column / kN * operand_rows + row + 1) * kN + column % kN, second);
    } else {
      const VecH low = bf16_bits(first);
      const VecH high = bf16_bits(second);
      if (rows != nullptr) {
        bfloat16* to = reinterpret_cast<bfloat16*>(rows) + (column / (2 * kN) * padded + row) * 2 * kN + column % (2 * kN);
        __builtin_memcpy(to, &low, sizeof(low));
        if (has_second) __builtin_memcpy(to + 2 * kN, &high, sizeof(high));
      }
      if (depths != nullptr) {
        store_operands(depths + (column / kN * operand_rows + row / 2) * kN + column % kN, pair_halves(low, high));
      }
    }
  }
};

template <class E>
FASTLM_INLINE Layouts<E> layouts_of(const GateBackward& p, const Group& group, void* rows, void* depths) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t at = group.packed - p.packed_begin;
  const int64_t runs = ceil_div(operand_depth<E>(p.inner), kN);
  Layouts<E> layouts{nullptr, group.padded, nullptr, p.packed_rows / depth_per_operand<E>};
  if (rows != nullptr) layouts.rows = static_cast<E*>(rows) + at * runs * kN;
  if (depths != nullptr) layouts.depths = static_cast<E*>(depths) + at / depth_per_operand<E> * kN;
  return layouts;
}

// What the block of one group needs beside the sums of its product.
template <class T>
struct GateBlock {
  using E = operand_t<T>;
  using A = acc_t<T>;
  using V = vec_t<T>;
  const GateBackward& p;
  const Group& group;
  int64_t column;
  Layouts<E> act, gate, up;
  A* sums;        // (2, kBlock) of dgate and dup over all rows, or null
  A* block_sums;  // the same over one block of rows: one chain over thousands of rows would lose digits
};

// One vector of columns of one row: its share of <da, act>, and what is to be written.
template <class T, class F, bool kGated>
struct GateRow {
  using A = acc_t<T>;
  using V = vec_t<T>;
  V act, dgate, dup;

  // Returns da * act.
  FASTLM_INLINE V form(const T* gate_up, int64_t inner, int64_t n, V da, A weight) {
    const V gate = load_upto(gate_up, n);
    V value, slope;
    F::both(gate, value, slope);
    const V weighted = da * weight;
    V full = value;
    if (kGated) {
      const V up_value = load_upto(gate_up + inner, n);
      full = value * up_value;
      dup = weighted * value;
      dgate = weighted * up_value * slope;
    } else {
      dgate = weighted * slope;
    }
    act = full * weight;
    return da * full;
  }
};

template <class T, class F, bool kGated>
void gate_rows(const GateBlock<T>& b, int64_t row, int64_t rows, int64_t columns, const acc_t<T>* c) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<A>;
  const GateBackward& p = b.p;
  const int64_t width = kGated ? 2 * p.inner : p.inner;
  const T* gate_up = static_cast<const T*>(p.gate_up) + (b.group.kept + row) * width + b.column;
  const A* weight = static_cast<const A*>(p.expert_weight) + b.group.begin + row;
  A* shares = static_cast<A*>(p.dweight_blocks) + b.column / kBlock * p.total_rows + b.group.begin + row;
  for (int64_t r = 0; r < rows; r += 2) {
    const bool has_second = r + 1 < rows;
    V share[2] = {};
    for (int64_t i = 0; i < columns; i += kLanes) {
      const int64_t n = columns - i;
      GateRow<T, F, kGated> first, second{};
      share[0] += first.form(gate_up + r * width + i, p.inner, n, load(c + r * kBlock + i), weight[r]);
      if (has_second) {
        share[1] += second.form(gate_up + (r + 1) * width + i, p.inner, n, load(c + (r + 1) * kBlock + i), weight[r + 1]);
      }
      const int64_t column = b.column + i;
      b.act.write(row + r, column, first.act, second.act, has_second);
      b.gate.write(row + r, column, first.dgate, second.dgate, has_second);
      if (kGated) b.up.write(row + r, column, first.dup, second.dup, has_second);
      if (b.sums == nullptr) continue;
      A* dgate_sums = b.block_sums + i;
      A* dup_sums = dgate_sums + kBlock;
      store(dgate_sums, load(dgate_sums) + first.dgate + second.dgate);
      if (kGated) store(dup_sums, load(dup_sums) + first.dup + second.dup);
    }
    shares[r] = reduce_add(share[0]);
    if (has_second) shares[r + 1] = reduce_add(share[1]);
  }
  for (int64_t i = 0; b.sums != nullptr && i < 2 * kBlock; i += kLanes) {
    store(b.sums + i, load(b.sums + i) + load(b.block_sums + i));
    store(b.block_sums + i, V{});
  }
}

template <class T, class F, bool kGated>
void gate_block(const GateBackward& p, const Group& group, int64_t column, int64_t columns, const NextPiece& next) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  char* scratch = static_cast<char*>(thread_scratch(kProductScratch<E> + 4 * sizeof(A) * kBlock));
  if (scratch == nullptr) return;
  A* sums = reinterpret_cast<A*>(scratch + kProductScratch<E>);
  GateBlock<T> b{p,
                 group,
                 column,
                 layouts_of<E>(p, group, nullptr, p.act_depths),
                 layouts_of<E>(p, group, p.dgate_rows, p.dgate_depths),
                 layouts_of<E>(p, group, p.dup_rows, p.dup_depths),
                 p.dbias == nullptr ? nullptr : sums,
                 sums + 2 * kBlock};
  if (p.dbias != nullptr) __builtin_memset(sums, 0, 4 * sizeof(A) * kBlock);
  const Segment segment{p.dy, p.down.rows, 0};
  const Ahead ahead = columns_of_next<T>(p.down, next, p.down.rows);
  const auto use = [&](int64_t row, int64_t rows, A* c) { gate_rows<T, F, kGated>(b, row, rows, columns, c); };
  group_times_weight<T>(p.down, group, p.packed_begin, &segment, 1, column, columns, ahead, scratch, block_use<A>(use));
  if (p.dbias == nullptr) return;
  const int64_t at = group.expert * (kGated ? 2 * p.inner : p.inner) + column;
  for (int64_t i = 0; i < columns; ++i) {
    store_param(p.dbias, p.dbias_dtype, at + i, sums[i]);
    if (kGated) store_param(p.dbias, p.dbias_dtype, at + p.inner + i, sums[kBlock + i]);
  }
}

template <class T>
void gate(const GateBackward& p, int64_t piece) {
  const int64_t blocks = ceil_div(p.inner, kBlock);
  const Group& group = p.groups.group[piece / blocks];
  const int64_t column = piece % blocks * kBlock;
  const int64_t columns = min_of(kBlock, p.inner - column);
  with_activation(p.activation, [&]<class F>() {
    const NextPiece next(p.groups, piece, blocks);
    p.gated ? gate_block<T, F, true>(p, group, column, columns, next) : gate_block<T, F, false>(p, group, column, columns, next);
  });
}

template <class T>
void row_product(const RowProduct& p, int64_t piece) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  void* scratch = thread_scratch(kProductScratch<E>);
  if (scratch == nullptr) return;
  const int64_t blocks = ceil_div(p.weight.depth, kBlock);
  const Group& group = p.groups.group[piece / blocks];
  const int64_t column = piece % blocks * kBlock;
  const int64_t columns = min_of(kBlock, p.weight.depth - column);
  const Ahead ahead = columns_of_next<T>(p.weight, NextPiece(p.groups, piece, blocks), p.segments[0].depth);
  const auto use = [&](int64_t row, int64_t rows, A* c) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (group.begin + row + r) * p.out_row_stride + column;
      if (p.out_acc) {
        store_row<A>(c + r * kBlock, static_cast<A*>(p.out) + at, columns);
      } else {
        store_row<T>(c + r * kBlock, static_cast<T*>(p.out) + at, columns);
      }
    }
  };
  group_times_weight<T>(p.weight, group, p.packed_begin, p.segments, p.num_segments, column, columns, ahead, scratch,
                        block_use<A>(use));
}

// Rows and columns of the result, summed over the rows of the group.
template <class E, class Out>
FASTLM_INLINE void outer_product(const Outer& p, const Group& group, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                 Out* out, int64_t out_row_stride) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t stride = p.packed_rows / depth_per_operand<E> * kN;
  const int64_t at = (group.packed - p.packed_begin) / depth_per_operand<E> * kN;
  PackedProduct<E, Out> product{};
  product.a = static_cast<const E*>(p.a) + row / kN * stride + at;
  product.a_stride = stride;
  product.b = static_cast<const E*>(p.b) + column / kN * stride + at;
  product.b_panel_stride = stride;
  product.c = out;
  product.c_row_stride = out_row_stride;
  product.c_panel_stride = kN;
  product.depth = operand_depth<E>(group.end - group.begin);
  product.rows = round_up(rows, kPackedRows);
  product.columns = round_up(columns, kOperandLanes<E>);
  packed_multiply<E, PackedA::kTransposed>(product);
}

template <class T>
void outer(const Outer& p, int64_t piece) {
  using E = operand_t<T>;
  using A = acc_t<T>;
  const int64_t across = ceil_div(p.columns, kBlock);
  const int64_t blocks = ceil_div(p.rows, kBlock) * across;
  const Group& group = p.groups.group[piece / blocks];
  const int64_t row = piece % blocks / across * kBlock;
  const int64_t column = piece % across * kBlock;
  const int64_t rows = min_of(kBlock, p.rows - row);
  const int64_t columns = min_of(kBlock, p.columns - column);
  T* out = static_cast<T*>(p.out) + (group.expert * p.out_rows + p.first_row + row) * p.columns + column;
  if (group.begin == group.end) {
    for (int64_t r = 0; r < rows; ++r) __builtin_memset(out + r * p.columns, 0, sizeof(T) * static_cast<size_t>(columns));
    return;
  }
  // Whole tiles that are summed in one go are rounded straight from the registers.
  if (group.end - group.begin <= kPackedDepth * depth_per_operand<E> && rows % kPackedRows == 0 &&
      columns % kOperandLanes<E> == 0) {
    outer_product<E>(p, group, row, rows, column, columns, out, p.columns);
    return;
  }
  A* c = static_cast<A*>(thread_scratch(sizeof(A) * kBlock * kBlock));
  if (c == nullptr) return;
  outer_product<E>(p, group, row, rows, column, columns, c, kBlock);
  for (int64_t r = 0; r < rows; ++r) store_row<T>(c + r * kBlock, out + r * p.columns, columns);
}

template <class T>
void bias(const BiasGradient& p, int64_t piece) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<A>;
  const int64_t blocks = ceil_div(p.dy.columns, kBlock);
  const Group& group = p.groups.group[piece / blocks];
  const int64_t column = piece % blocks * kBlock;
  const int64_t columns = min_of(kBlock, p.dy.columns - column);
  // Rows are summed in blocks: one chain over thousands of them would lose digits.
  A sums[kBlock] = {}, block[kBlock] = {};
  for (int64_t r = group.begin; r < group.end; ++r) {
    const V weight = broadcast<V>(static_cast<const A*>(p.expert_weight)[r]);
    const T* from = source_row<T>(p.dy, r) + column;
    for (int64_t i = 0; i < columns; i += kLanes) {
      store(block + i, fma(weight, load_upto(from + i, columns - i), load(block + i)));
    }
    if ((r - group.begin) % kRowBlock < kRowBlock - 1 && r + 1 < group.end) continue;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      store(sums + i, load(sums + i) + load(block + i));
      store(block + i, V{});
    }
  }
  for (int64_t i = 0; i < columns; ++i) store_param(p.out, p.dtype, group.expert * p.dy.columns + column + i, sums[i]);
}

template <class T>
void pick(const PickGradient& p, int64_t piece) {
  using A = acc_t<T>;
  const Group& group = p.groups.group[piece];
  const Weights& w = p.down;
  for (int64_t r = group.begin; r < group.end; ++r) {
    A sum = A(0);
    for (int64_t b = 0; b < p.blocks; ++b) sum += static_cast<const A*>(p.dweight_blocks)[b * p.total_rows + r];
    if (w.bias != nullptr) {
      const T* from = source_row<T>(p.dy, r);
      A lanes[16] = {};  // sixteen sums at a time, whatever the level
      for (int64_t i = 0; i < p.dy.columns; ++i) {
        lanes[i % 16] +=
            to_acc(from[i]) * load_param<A>(w.bias, w.bias_dtype, group.expert * w.bias_expert_stride + i * w.bias_stride);
      }
      for (const A lane : lanes) sum += lane;
    }
    store_param(p.dweights, p.dtype, p.perm[r], sum);
  }
}

}  // namespace

extern const moe_dispatch::BackwardKernels moe_dispatch_backward;
const moe_dispatch::BackwardKernels moe_dispatch_backward = {
    {gate<float>, gate<bfloat16>, gate<float16>, gate<double>},
    {row_product<float>, row_product<bfloat16>, row_product<float16>, row_product<double>},
    {outer<float>, outer<bfloat16>, outer<float16>, outer<double>},
    {bias<float>, bias<bfloat16>, bias<float16>, bias<double>},
    {pick<float>, pick<bfloat16>, pick<float16>, pick<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
