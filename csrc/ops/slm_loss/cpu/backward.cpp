// Gradients of the per-token losses of a linear head. With the logits recomputed block by block and p_v = e^(z_v - lse):
//   dz_v = p_v (dnll + dlse - dentropy (z_v - lse + entropy)) - [v = label] dnll,   times 1 - (z_v / softcap)^2 with a soft cap,
//   dhidden = dz weight,  dweight = dz^T hidden,  dbias = column sums of dz.
// dz of a panel of the vocabulary is laid down for all rows; then dhidden takes its share (panels in order), and the panel's rows
// of dweight are final. Sums are kept in the accumulation type. Bound by three products, 6 n h V operations.
#include "core/scratch.h"
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::BackwardParams;
using slm_loss::kColumnBlock;
using slm_loss::kRowBlock;
using slm_loss::Panel;

template <class A>
FASTLM_INLINE A value_at(const void* p, int64_t i) {
  return p == nullptr ? A(0) : static_cast<const A*>(p)[i];
}

// z of one row of the block becomes dz, in place.
template <class E>
void row_gradient(const BackwardParams& p, operand_acc<E>* z, int64_t r, int64_t columns, int64_t position, int64_t label) {
  using A = operand_acc<E>;
  using V = vec_t<operand_acc<E>>;
  const A dnll = value_at<A>(p.dnll, position);
  const V shared = broadcast<V>(dnll + value_at<A>(p.dlse, position));
  const V dentropy = broadcast<V>(value_at<A>(p.dentropy, position));
  const V entropy = broadcast<V>(value_at<A>(p.entropy_in, position));
  const V lse = broadcast<V>(value_at<A>(p.lse, position));
  const A inverse = p.softcap > 0 ? static_cast<A>(1 / p.softcap) : A(0);
  const V inverse_cap = broadcast<V>(inverse);
  const bool here = label >= 0 && label < columns;
  const A z_label = here ? z[block_offset<E>(r, label)] : A(0);
  for (int64_t c = 0; c < columns; c += kOperandLanes<E>) {
    A* at = z + block_offset<E>(r, c);
    const V value = load(at);
    const V t = shifted(value, lse);
    V grad = shared;
    if (p.entropy) grad -= dentropy * (t + entropy);
    grad *= exp_fast(t);
    if (p.softcap > 0) {
      const V ratio = value * inverse_cap;
      grad *= 1 - ratio * ratio;
    }
    store(at, grad);
  }
  if (here) z[block_offset<E>(r, label)] -= dnll * (1 - (z_label * inverse) * (z_label * inverse));
}

// Rounds to bf16, the result in the upper half of each lane.
FASTLM_INLINE VecI bf16_bits(VecF v) {
  bfloat16 lane[kLanesF];
  store(lane, v);
  return (VecI)load(lane);
}

// dz of the block into the layouts of the two products, from column `column` of the panel on; floats have one layout for both.
template <class E>
void emit(const BackwardParams& p, const Panel& panel, const Block& block, int64_t column, const operand_acc<E>* dz) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t tiles = ceil_div(block.columns, kN);
  if constexpr (depth_per_operand<E> == 1) {
    E* to = static_cast<E*>(panel.dlogits_rows) + (column / kN * p.capacity + block.row) * kN;
    for (int64_t j = 0; j < tiles; ++j) {
      for (int64_t i = 0; i < block.rows * kN; i += kOperandLanes<E>) {
        store(to + j * p.capacity * kN + i, load(dz + j * kRowBlock * kN + i));
      }
    }
  } else {
    auto* rows = static_cast<bfloat16*>(panel.dlogits_rows);
    E* transposed = static_cast<E*>(panel.dlogits_transposed);
    for (int64_t r = 0; r < block.rows; r += 2) {
      const bool last = r + 1 == block.rows;  // an odd number of rows: the pair's second half is 0
      for (int64_t i = 0; i < tiles * kN; i += kOperandLanes<E>) {
        const VecF low = load(dz + block_offset<E>(r, i));
        const VecF high = last ? VecF{} : load(dz + block_offset<E>(r + 1, i));
        const int64_t c = column + i;
        if (rows != nullptr) {  // a run of N pairs is 2 N columns
          bfloat16* to = rows + ((c / (2 * kN)) * p.capacity + block.row + r) * 2 * kN + c % (2 * kN);
          store(to, low);
          if (!last) store(to + 2 * kN, high);
        }
        if (transposed != nullptr) {
          const VecI pairs = ((bf16_bits(low) >> 16) & 0xffff) | bf16_bits(high);
          __builtin_memcpy(transposed + ((c / kN) * (p.capacity / 2) + (block.row + r) / 2) * kN + c % kN, &pairs, sizeof(pairs));
        }
      }
    }
  }
}

template <class E>
void add_rows(const operand_acc<E>* dz, const Block& block, operand_acc<E>* sums) {
  for (int64_t c = 0; c < block.columns; c += kOperandLanes<E>) {
    vec_t<operand_acc<E>> sum = {};
    for (int64_t r = 0; r < block.rows; ++r) sum += load(dz + block_offset<E>(r, c));
    store(sums + c, sum);
  }
}

template <class E>
void dlogits(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using A = operand_acc<E>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(panel.end - panel.begin, kColumnBlock);
  const int64_t row = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  const Block block{row, min_of(kRowBlock, p.num_rows - row), min_of(kColumnBlock, panel.end - panel.begin - column)};
  const int64_t columns = ceil_div(block.columns, kN) * kN;
  A* z = static_cast<A*>(thread_scratch(sizeof(A) * kBlockSize));
  if (z == nullptr) return;
  block_logits<E>(p, block, static_cast<const E*>(panel.weight_columns) + column * operand_depth<E>(p.hidden_size),
                  static_cast<const A*>(panel.bias) + column, z);
  for (int64_t r = 0; r < block.rows; ++r) {
    row_gradient<E>(p, z, r, columns, p.rows[row + r], p.labels[row + r] - panel.begin - column);
    // Columns of no word: their weights are 0, but so must be their gradient (with a soft cap it is 0 times infinity so far).
    for (int64_t c = block.columns; c < columns; ++c) z[block_offset<E>(r, c)] = A(0);
  }
  if (p.dbias != nullptr) {
    add_rows<E>(z, block, static_cast<A*>(panel.dbias_blocks) + row / kRowBlock * panel.size + column);
  }
  emit<E>(p, panel, block, column, z);
}

template <class T>
void write_row(const acc_t<T>* from, T* to, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes_of<T>) store_upto(to + c, load(from + c), n - c);
}

template <class T>
void dhidden(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  const int64_t row = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  const int64_t rows = min_of(kRowBlock, p.num_rows - row);
  acc_t<T>* sum = static_cast<acc_t<T>*>(p.dhidden_sum) + row * p.padded_hidden + column;
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(panel.dlogits_rows) + row * kN;
  product.a_stride = p.capacity * kN;
  product.b_panel_stride = panel.size / depth_per_operand<E> * kN;
  product.b = static_cast<const E*>(panel.weight_rows) + column / kN * product.b_panel_stride;
  product.c = sum;
  product.c_row_stride = p.padded_hidden;
  product.c_panel_stride = kN;
  product.depth = operand_depth<E>(panel.end - panel.begin);
  product.rows = ceil_div(rows, kPackedRows) * kPackedRows;
  product.columns = min_of(kColumnBlock, p.padded_hidden - column);
  product.add = panel.begin > 0;
  product.block = kPackedDepth / depth_per_operand<E>;  // as many words as the narrowest panel: the same sums for every width
  packed_multiply<E, PackedA::kRows>(product);
  if (panel.end < p.vocab) return;
  for (int64_t r = 0; r < rows; ++r) {
    write_row<T>(sum + r * p.padded_hidden, static_cast<T*>(p.dhidden) + p.rows[row + r] * p.hidden_size + column,
                 min_of(kColumnBlock, p.hidden_size - column));
  }
}

template <class T>
void dweight(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  const int64_t word = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  const int64_t words = min_of(kRowBlock, panel.end - panel.begin - word);
  const int64_t stride = p.capacity / depth_per_operand<E> * kN;
  acc_t<T>* sum = static_cast<acc_t<T>*>(thread_scratch(sizeof(acc_t<T>) * kBlockSize));
  if (sum == nullptr) return;
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(panel.dlogits_transposed) + word / kN * stride;
  product.a_stride = stride;
  product.b = static_cast<const E*>(p.hidden_columns) + column / kN * stride;
  product.b_panel_stride = stride;
  product.c = sum;
  product.c_row_stride = kColumnBlock;
  product.c_panel_stride = kN;
  product.depth = operand_depth<E>(p.num_rows);
  product.rows = ceil_div(words, kPackedRows) * kPackedRows;
  product.columns = min_of(kColumnBlock, p.padded_hidden - column);
  packed_multiply<E, PackedA::kTransposed>(product);
  for (int64_t r = 0; r < words; ++r) {
    write_row<T>(sum + r * kColumnBlock, static_cast<T*>(p.dweight) + (panel.begin + word + r) * p.hidden_size + column,
                 min_of(kColumnBlock, p.hidden_size - column));
  }
}

template <class A>
FASTLM_INLINE void store_param(void* p, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<bfloat16*>(p)[i] = from_acc<bfloat16>(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<float16*>(p)[i] = from_acc<float16>(static_cast<float>(value));
      break;
    case DType::kFloat64:
      static_cast<double*>(p)[i] = static_cast<double>(value);
      break;
  }
}

template <class A>
void dbias(const BackwardParams& p, const Panel& panel, int64_t piece) {
  const A* blocks = static_cast<const A*>(panel.dbias_blocks);
  for (int64_t c = piece * kColumnBlock; c < min_of((piece + 1) * kColumnBlock, panel.end - panel.begin); ++c) {
    A sum = A(0);
    for (int64_t b = 0; b < ceil_div(p.num_rows, kRowBlock); ++b) sum += blocks[b * panel.size + c];
    store_param(p.dbias, p.bias_dtype, panel.begin + c, sum);
  }
}

}  // namespace

extern const slm_loss::BackwardKernels slm_loss_backward;
const slm_loss::BackwardKernels slm_loss_backward = {
    {dlogits<operand_t<float>>, dlogits<operand_t<bfloat16>>, dlogits<operand_t<float16>>, dlogits<operand_t<double>>},
    {dhidden<float>, dhidden<bfloat16>, dhidden<float16>, dhidden<double>},
    {dweight<float>, dweight<bfloat16>, dweight<float16>, dweight<double>},
    {dbias<float>, dbias<float>, dbias<float>, dbias<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
