// Blocks of an expert's matrix, packed for the product that needs them, and the loops around packed_multiply that both products
// share: sums of a block stay in the second-level cache while the depth passes by in chunks. Per-level code.
#pragma once

#include "core/simd/packed_matrix.h"
#include "ops/moe_dispatch/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using moe_dispatch::Group;
using moe_dispatch::Groups;
using moe_dispatch::kBlock;
using moe_dispatch::kChunk;
using moe_dispatch::kHalfBlock;
using moe_dispatch::kRowBlock;
using moe_dispatch::Segment;
using moe_dispatch::Weights;

FASTLM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Working memory of a product: a packed chunk of the weight, then a block of sums.
template <class E>
constexpr size_t kProductScratch = sizeof(E) * kChunk * kBlock + sizeof(operand_acc<E>) * kRowBlock * kBlock;

template <class T>
FASTLM_INLINE const T* element(const Weights& w, int64_t expert, int64_t row, int64_t depth) {
  return static_cast<const T*>(w.data) + expert * w.expert_stride + row * w.row_stride + depth * w.depth_stride;
}

// What is read of a weight next: rows of `values` each, fetched while a product runs. Strided weights are left to the hardware.
template <class T>
FASTLM_INLINE void add_stretch(Ahead& ahead, int stretch, const T* first, int64_t rows, int64_t stride, int64_t values) {
  ahead.row[stretch] = reinterpret_cast<const char*>(first);
  ahead.rows[stretch] = rows;
  ahead.row_stride = stride * static_cast<int64_t>(sizeof(T));
  ahead.row_bytes = values * static_cast<int64_t>(sizeof(T));
}

// Rows of a weight whose depth is contiguous are rows of A as they lie; one whose rows are contiguous is a transposed A.
FASTLM_INLINE bool is_transposed(const Weights& w) { return w.row_stride == 1 && w.depth_stride != 1; }

// Row `row` of those that a source holds for sorted rows.
template <class T>
FASTLM_INLINE const T* source_row(const moe_dispatch::Source& from, int64_t row) {
  return static_cast<const T*>(from.data) + (from.index == nullptr ? row : from.index[row]) * from.row_stride;
}

// Rows [first, first + count) of the weight, and where they begin in a block of kBlock rows.
struct RowRange {
  int64_t first, count;
  int64_t at;
};

// What is done with a block of sums. A function of a context instead of a template's argument: the products, which are most of
// the code, are compiled once for every element type and not once for every activation.
template <class A>
struct BlockUse {
  void (*call)(const void* context, int64_t row, int64_t rows, A* c);
  const void* context;
};
template <class A, class F>
FASTLM_INLINE BlockUse<A> block_use(const F& f) {
  return {[](const void* context, int64_t row, int64_t rows, A* c) { (*static_cast<const F*>(context))(row, rows, c); }, &f};
}

// The group and the block within it that piece i + threads is about, if there is such a piece and it packs what it reads.
struct NextPiece {
  const Group* group = nullptr;
  int64_t block = 0;

  FASTLM_INLINE NextPiece(const Groups& groups, int64_t piece, int64_t blocks) {
    const int64_t next = piece + groups.threads;
    if (next >= groups.count * blocks || groups.group[next / blocks].small) return;
    group = groups.group + next / blocks;
    block = next % blocks;
  }
};

// ---- forward: rows of the weight x packed columns of x ------------------------------------------------------------------

template <class T>
void pack_weight_rows(const Weights& w, int64_t expert, const RowRange& range, int64_t depth, int64_t count, operand_t<T>* out) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const T* first = element<T>(w, expert, range.first, depth);
  if (is_transposed(w)) {
    const int64_t operands = operand_depth<E>(count);
    const Rows<T> from{first, nullptr, w.depth_stride, 1, count, range.count};
    pack_depths<T, E>(from, operands * depth_per_operand<E>, out + range.at * operands, 0, operands * depth_per_operand<E>);
  } else {
    const Rows<T> from{first, nullptr, w.row_stride, w.depth_stride, range.count, count};
    pack_rows<T, E>(from, kBlock, out + range.at * kN, 0, round_up(range.count, kPackedRows));
  }
}

template <class E>
FASTLM_INLINE void multiply_weight_rows(PackedProduct<E> product, bool transposed, const E* weight, const RowRange& range,
                                        operand_acc<E>* c) {
  constexpr int64_t kN = kPackedColumns<E>;
  product.rows = round_up(range.count, kPackedRows);
  product.c = c + range.at * kN;
  if (transposed) {
    product.a = weight + range.at * product.depth;
    product.a_stride = product.depth * kN;
    packed_multiply<E, PackedA::kTransposed>(product);
  } else {
    product.a = weight + range.at * kN;
    product.a_stride = kBlock * kN;
    packed_multiply<E, PackedA::kRows>(product);
  }
}

// Calls `use` with (first sorted row of the block, rows in it, sums) for all rows of the group. Sums lie in panels of N sorted
// rows: (rows / N, kBlock, N). `x` are the group's packed columns.
template <class T>
FASTLM_INLINE Ahead rows_ahead(const Weights& w, int64_t expert, const RowRange* ranges, int64_t num_ranges, int64_t depth,
                               int64_t count) {
  Ahead ahead{};
  for (int i = 0; i < num_ranges; ++i) {
    const T* first = element<T>(w, expert, ranges[i].first, depth);
    if (is_transposed(w)) {
      add_stretch(ahead, i, first, count, w.depth_stride, ranges[i].count);
    } else if (w.depth_stride == 1) {
      add_stretch(ahead, i, first, ranges[i].count, w.row_stride, count);
    }
  }
  return ahead;
}

template <class T>
void weight_times_group(const Weights& w, const Group& group, const operand_t<T>* x, const RowRange* ranges, int64_t num_ranges,
                        const Ahead& next_piece, void* scratch, const BlockUse<acc_t<T>>& use) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  constexpr int64_t kValues = kChunk * depth_per_operand<E>;
  E* weight = static_cast<E*>(scratch);
  operand_acc<E>* c = reinterpret_cast<operand_acc<E>*>(weight + kChunk * kBlock);
  const int64_t operands = operand_depth<E>(w.depth);
  const bool transposed = is_transposed(w);
  for (int64_t row = 0; row < group.end - group.begin; row += kRowBlock) {
    for (int64_t depth = 0; depth == 0 || depth < w.depth; depth += kValues) {
      const int64_t count = min_of(kValues, w.depth - depth);
      if (row == 0 || w.depth > kValues) {
        for (int64_t i = 0; i < num_ranges; ++i) pack_weight_rows<T>(w, group.expert, ranges[i], depth, count, weight);
      }
      PackedProduct<E> product{};
      product.b = x + row * operands + depth / depth_per_operand<E> * kN;
      product.b_panel_stride = operands * kN;
      product.c_row_stride = kN;
      product.c_panel_stride = kBlock * kN;
      product.depth = operand_depth<E>(count);
      product.columns = round_up(min_of(kRowBlock, group.end - group.begin - row), kOperandLanes<E>);
      product.add = depth > 0;
      if (const int64_t next = min_of(kValues, w.depth - depth - kValues); next > 0) {
        product.ahead = rows_ahead<T>(w, group.expert, ranges, num_ranges, depth + kValues, next);
      } else if (row + kRowBlock >= group.end - group.begin) {
        product.ahead = next_piece;
      }
      if (num_ranges == 2 && ranges[0].count == kHalfBlock && ranges[1].count == kHalfBlock) {
        multiply_weight_rows<E>(product, transposed, weight, {0, kBlock, 0}, c);
      } else {
        for (int64_t i = 0; i < num_ranges; ++i) {
          multiply_weight_rows<E>(product, transposed, weight, ranges[i], c);
          product.ahead = {};
        }
      }
    }
    use.call(use.context, group.begin + row, min_of(kRowBlock, group.end - group.begin - row), c);
  }
}

// Sums in panels of N sorted rows become rows: `count` values each.
template <class A, class Out, int64_t kN>
void store_transposed(const A* c, int64_t rows, int64_t count, Out* out, int64_t out_row_stride) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const A* panel = c + row / kN * kBlock * kN + row % kN;
    for (int64_t i = 0; i < count; i += kLanes) {
      V square[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) square[j] = load(panel + (i + j) * kN);  // kBlock is a multiple of the lanes
      transpose(square);
      for (int64_t j = 0; j < min_of(kLanes, rows - row); ++j) {
        store_upto(out + (row + j) * out_row_stride + i, square[j], count - i);
      }
    }
  }
}

// ---- backward: packed rows x columns of the weight ----------------------------------------------------------------------

template <class T>
void pack_weight_columns(const Weights& w, int64_t expert, int64_t depth, int64_t count, int64_t column, int64_t columns,
                         operand_t<T>* out) {
  using E = operand_t<T>;
  const T* first = element<T>(w, expert, depth, column);
  const int64_t operands = operand_depth<E>(count);
  if (is_transposed(w)) {
    const Rows<T> from{first, nullptr, w.depth_stride, 1, columns, count};
    pack_columns<T, E>(from, out, 0, round_up(columns, kPackedColumns<E>));
  } else {
    const Rows<T> from{first, nullptr, w.row_stride, w.depth_stride, count, columns};
    pack_depths<T, E>(from, operands * depth_per_operand<E>, out, 0, operands * depth_per_operand<E>);
  }
}

// Calls `use` with (first row of the block in the group, rows in it, sums) for all rows of the group. Sums are row-major, kBlock
// columns.
template <class T>
FASTLM_INLINE Ahead columns_ahead(const Weights& w, int64_t expert, int64_t depth, int64_t count, int64_t column,
                                  int64_t columns) {
  Ahead ahead{};
  const T* first = element<T>(w, expert, depth, column);
  if (is_transposed(w)) {
    add_stretch(ahead, 0, first, columns, w.depth_stride, count);
  } else if (w.depth_stride == 1) {
    add_stretch(ahead, 0, first, count, w.row_stride, columns);
  }
  return ahead;
}

// The first chunk that a piece about this block of columns packs.
template <class T>
FASTLM_INLINE Ahead columns_of_next(const Weights& w, const NextPiece& next, int64_t depth) {
  if (next.group == nullptr) return {};
  const int64_t column = next.block * kBlock;
  const int64_t count = min_of(kChunk * depth_per_operand<operand_t<T>>, depth);
  return columns_ahead<T>(w, next.group->expert, 0, count, column, min_of(kBlock, w.depth - column));
}

template <class T>
void group_times_weight(const Weights& w, const Group& group, int64_t packed_begin, const Segment* segments, int64_t num_segments,
                        int64_t column, int64_t columns, const Ahead& next_piece, void* scratch, const BlockUse<acc_t<T>>& use) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  constexpr int64_t kValues = kChunk * depth_per_operand<E>;
  E* weight = static_cast<E*>(scratch);
  operand_acc<E>* c = reinterpret_cast<operand_acc<E>*>(weight + kChunk * kBlock);
  const bool one_chunk = num_segments == 1 && segments[0].depth <= kValues;
  for (int64_t row = 0; row < group.end - group.begin; row += kRowBlock) {
    const int64_t rows = min_of(kRowBlock, group.end - group.begin - row);
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments[s];
      const int64_t runs = ceil_div(operand_depth<E>(segment.depth), kN);
      const E* a = static_cast<const E*>(segment.a) + (group.packed - packed_begin) * runs * kN + row * kN;
      for (int64_t depth = 0; depth == 0 || depth < segment.depth; depth += kValues) {
        const int64_t count = min_of(kValues, segment.depth - depth);
        if (row == 0 || !one_chunk) {
          pack_weight_columns<T>(w, group.expert, segment.weight_row + depth, count, column, columns, weight);
        }
        PackedProduct<E> product{};
        product.a_stride = group.padded * kN;
        product.a = a + depth / depth_per_operand<E> / kN * product.a_stride;
        product.b = weight;
        product.depth = operand_depth<E>(count);
        product.b_panel_stride = product.depth * kN;
        product.c = c;
        product.c_row_stride = kBlock;
        product.c_panel_stride = kN;
        product.rows = round_up(rows, kPackedRows);
        product.columns = round_up(columns, kOperandLanes<E>);
        product.add = s > 0 || depth > 0;
        if (const int64_t next = min_of(kValues, segment.depth - depth - kValues); next > 0) {
          product.ahead = columns_ahead<T>(w, group.expert, segment.weight_row + depth + kValues, next, column, columns);
        } else if (s + 1 < num_segments) {
          const Segment& then = segments[s + 1];
          product.ahead = columns_ahead<T>(w, group.expert, then.weight_row, min_of(kValues, then.depth), column, columns);
        } else if (row + kRowBlock >= group.end - group.begin) {
          product.ahead = next_piece;
        }
        packed_multiply<E, PackedA::kRows>(product);
      }
    }
    use.call(use.context, row, rows, c);
  }
}

template <class T>
FASTLM_INLINE void store_row(const acc_t<T>* from, T* to, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes_of<T>) store_upto(to + c, load(from + c), n - c);
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
