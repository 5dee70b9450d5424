// Gradients of the per-token losses of a linear head. With the logits recomputed block by block and p_v = e^(z_v - lse):
//   dz_v = p_v (dnll + dlse - dentropy (z_v - lse + entropy)) - [v = label] dnll,   times 1 - (z_v / softcap)^2 with a soft cap,
//   dhidden = dz weight,  dweight = dz^T hidden,  dbias = column sums of dz.
// One step fills dz for a panel of the vocabulary and a group of rows, then adds its share to dhidden (panels in order) and to
// the panel's rows of dweight (groups in order), both in the accumulation type. Bound by three products, 6 n h V operations.
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::BackwardParams;
using slm_loss::kColumnBlock;
using slm_loss::kRowBlock;
using slm_loss::Step;

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

// dz of the block into the layouts of the two products; floats have one layout for both.
template <class E>
void emit(const BackwardParams& p, const Block& block, const operand_acc<E>* dz) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t panels = ceil_div(block.columns, kN);
  if constexpr (depth_per_operand<E> == 1) {
    E* to = static_cast<E*>(p.dlogits_rows) + (block.column / kN * p.group_size + block.row) * kN;
    for (int64_t j = 0; j < panels; ++j) {
      for (int64_t i = 0; i < block.rows * kN; i += kOperandLanes<E>) {
        store(to + j * p.group_size * kN + i, load(dz + j * kRowBlock * kN + i));
      }
    }
  } else {
    auto* rows = static_cast<bfloat16*>(p.dlogits_rows);
    E* transposed = static_cast<E*>(p.dlogits_transposed);
    for (int64_t r = 0; r < block.rows; r += 2) {
      const bool last = r + 1 == block.rows;  // an odd number of rows: the pair's second half is 0
      for (int64_t c = 0; c < panels * kN; c += kOperandLanes<E>) {
        const VecF low = load(dz + block_offset<E>(r, c));
        const VecF high = last ? VecF{} : load(dz + block_offset<E>(r + 1, c));
        const int64_t column = block.column + c;
        if (rows != nullptr) {  // a run of N words is 2 N columns
          bfloat16* to = rows + ((column / (2 * kN)) * p.group_size + block.row + r) * 2 * kN + column % (2 * kN);
          store(to, low);
          if (!last) store(to + 2 * kN, high);
        }
        if (transposed != nullptr) {
          const VecI words = ((bf16_bits(low) >> 16) & 0xffff) | bf16_bits(high);
          E* to = transposed + ((column / kN) * (p.group_size / 2) + (block.row + r) / 2) * kN + column % kN;
          __builtin_memcpy(to, &words, sizeof(words));
        }
      }
    }
  }
}

template <class E>
void add_columns(const operand_acc<E>* dz, const Block& block, operand_acc<E>* sums) {
  using V = vec_t<operand_acc<E>>;
  for (int64_t c = 0; c < ceil_div(block.columns, kOperandLanes<E>) * kOperandLanes<E>; c += kOperandLanes<E>) {
    V sum = {};
    for (int64_t r = 0; r < block.rows; ++r) sum += load(dz + block_offset<E>(r, c));
    store(sums + c, sum);
  }
}

template <class E>
void dlogits(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  using A = operand_acc<E>;
  constexpr int64_t kN = kPackedColumns<E>;
  for (int64_t piece = begin; piece < end; ++piece) {
    const Block block = find_block(s, piece);
    A* z = block_logits<E>(p, block);
    const int64_t columns = ceil_div(block.columns, kN) * kN;
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = s.row_begin + block.row + r;
      const int64_t label = p.labels[row] - s.vocab_begin - block.column;
      row_gradient<E>(p, z, r, columns, p.rows[row], label);
      // Columns of no token: their weights are 0, but so must be their gradient (with a soft cap it is 0 times infinity so far).
      for (int64_t c = block.columns; c < columns; ++c) z[block_offset<E>(r, c)] = A(0);
    }
    if (p.dbias_sum != nullptr) {
      add_columns<E>(z, block, static_cast<A*>(p.dbias_sum) + block.row / kRowBlock * p.panel_size + block.column);
    }
    emit<E>(p, block, z);
  }
}

template <class E>
void dhidden(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / across * kRowBlock;
    const int64_t column = piece % across * kColumnBlock;
    const int64_t rows = min_of(kRowBlock, s.row_end - s.row_begin - row);
    PackedProduct<E> product{};
    product.a = static_cast<const E*>(p.dlogits_rows) + row * kN;
    product.a_stride = p.group_size * kN;
    product.b_panel_stride = p.panel_size / depth_per_operand<E> * kN;
    product.b = static_cast<const E*>(p.weight_rows) + column / kN * product.b_panel_stride;
    product.c = static_cast<operand_acc<E>*>(p.dhidden_sum) + (s.row_begin + row) * p.padded_hidden + column;
    product.c_row_stride = p.padded_hidden;
    product.c_panel_stride = kN;
    product.depth = ceil_div(s.vocab_end - s.vocab_begin, depth_per_operand<E>);
    product.rows = ceil_div(rows, kPackedRows) * kPackedRows;
    product.columns = min_of(kColumnBlock, p.padded_hidden - column);
    product.add = s.vocab_begin > 0;
    packed_multiply<E, PackedA::kRows>(product);
  }
}

template <class E>
void dweight(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  const int64_t panel_stride = p.group_size / depth_per_operand<E> * kN;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / across * kRowBlock;
    const int64_t column = piece % across * kColumnBlock;
    const int64_t rows = min_of(kRowBlock, s.vocab_end - s.vocab_begin - row);
    PackedProduct<E> product{};
    product.a = static_cast<const E*>(p.dlogits_transposed) + row / kN * panel_stride;
    product.a_stride = panel_stride;
    product.b = static_cast<const E*>(p.hidden_columns) + column / kN * panel_stride;
    product.b_panel_stride = panel_stride;
    product.c = static_cast<operand_acc<E>*>(p.dweight_sum) + row * p.padded_hidden + column;
    product.c_row_stride = p.padded_hidden;
    product.c_panel_stride = kN;
    product.depth = ceil_div(s.row_end - s.row_begin, depth_per_operand<E>);
    product.rows = ceil_div(rows, kPackedRows) * kPackedRows;
    product.columns = min_of(kColumnBlock, p.padded_hidden - column);
    product.add = s.row_begin > 0;
    packed_multiply<E, PackedA::kTransposed>(product);
  }
}

template <class A>
void dbias(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  const A* sums = static_cast<const A*>(p.dbias_sum);
  A* total = static_cast<A*>(p.dbias_sum) + p.group_size / kRowBlock * p.panel_size;
  const int64_t blocks = ceil_div(s.row_end - s.row_begin, kRowBlock);
  for (int64_t c = begin * kColumnBlock; c < min_of(end * kColumnBlock, s.vocab_end - s.vocab_begin); ++c) {
    A sum = s.row_begin > 0 ? total[c] : A(0);
    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * p.panel_size + c];
    total[c] = sum;
  }
}

template <class T>
void write_row(const acc_t<T>* from, T* to, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes_of<T>) store_upto(to + c, load(from + c), n - c);
}

template <class T>
void write_dhidden(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  for (int64_t row = begin * kRowBlock; row < min_of(end * kRowBlock, s.row_end); ++row) {
    write_row<T>(static_cast<const acc_t<T>*>(p.dhidden_sum) + row * p.padded_hidden,
                 static_cast<T*>(p.dhidden) + p.rows[row] * p.hidden_size, p.hidden_size);
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

template <class T>
void write_dweight(const BackwardParams& p, const Step& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* dbias_total =
      p.dbias == nullptr ? nullptr : static_cast<const A*>(p.dbias_sum) + p.group_size / kRowBlock * p.panel_size;
  for (int64_t r = begin * kRowBlock; r < min_of(end * kRowBlock, s.vocab_end - s.vocab_begin); ++r) {
    const int64_t v = s.vocab_begin + r;
    if (p.dweight != nullptr) {
      write_row<T>(static_cast<const A*>(p.dweight_sum) + r * p.padded_hidden, static_cast<T*>(p.dweight) + v * p.hidden_size,
                   p.hidden_size);
    }
    if (dbias_total != nullptr) store_param(p.dbias, p.bias_dtype, v, dbias_total[r]);
  }
}

}  // namespace

extern const slm_loss::BackwardKernels slm_loss_backward;
const slm_loss::BackwardKernels slm_loss_backward = {
    {dlogits<operand_t<float>>, dlogits<operand_t<bfloat16>>, dlogits<operand_t<float16>>, dlogits<operand_t<double>>},
    {dhidden<operand_t<float>>, dhidden<operand_t<bfloat16>>, dhidden<operand_t<float16>>, dhidden<operand_t<double>>},
    {dweight<operand_t<float>>, dweight<operand_t<bfloat16>>, dweight<operand_t<float16>>, dweight<operand_t<double>>},
    {dbias<float>, dbias<float>, dbias<float>, dbias<double>},
    {write_dhidden<float>, write_dhidden<bfloat16>, write_dhidden<float16>, write_dhidden<double>},
    {write_dweight<float>, write_dweight<bfloat16>, write_dweight<float16>, write_dweight<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
