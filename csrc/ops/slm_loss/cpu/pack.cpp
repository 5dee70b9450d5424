// The packing phases of slm_loss.
#include "ops/slm_loss/cpu/pack.h"

#include "ops/slm_loss/cpu/kernels.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::kRowBlock;
using slm_loss::kTokenBlock;
using slm_loss::Panel;
using slm_loss::Params;

template <class T>
void hidden(const Params& p, int64_t piece) {
  using E = operand_t<T>;
  const Rows<T> from{
      static_cast<const T*>(p.hidden), p.positions, p.hidden_row_stride, p.hidden_col_stride, p.num_tokens, p.hidden_size};
  const int64_t begin = piece * kTokenBlock;
  const int64_t end = begin + kTokenBlock;
  pack_columns<T, E>(from, static_cast<E*>(p.hidden_columns), begin, end);
  if (p.hidden_depths != nullptr) pack_depths<T, E>(from, p.capacity, static_cast<E*>(p.hidden_depths), begin, end);
}

template <class T>
void weight_rows(const Params& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  const int64_t begin = piece * kRowBlock;
  const int64_t end = begin + kRowBlock;
  pack_rows<T, E>(words_of<T>(p, panel.begin, panel.end), panel.size, static_cast<E*>(panel.weight_rows), begin, end);
  pack_bias(p, panel.begin, panel.end, static_cast<acc_t<T>*>(panel.bias), begin, end);
}

template <class T>
void weight_depths(const Params& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  const int64_t begin = piece * kRowBlock;
  pack_depths<T, E>(words_of<T>(p, panel.begin, panel.end), panel.size, static_cast<E*>(panel.weight_depths), begin,
                    begin + kRowBlock);
}

template <class T>
constexpr int64_t columns_of = kPackedColumns<operand_t<T>>;
template <class T>
constexpr int64_t elements_of = depth_per_operand<operand_t<T>>;

}  // namespace

extern const slm_loss::PackKernels slm_loss_pack;
const slm_loss::PackKernels slm_loss_pack = {
    {columns_of<float>, columns_of<bfloat16>, columns_of<float16>, columns_of<double>},
    {elements_of<float>, elements_of<bfloat16>, elements_of<float16>, elements_of<double>},
    {kPackedDepth, kPackedDepth, kPackedDepth, kPackedDepth},
    {hidden<float>, hidden<bfloat16>, hidden<float16>, hidden<double>},
    {weight_rows<float>, weight_rows<bfloat16>, weight_rows<float16>, weight_rows<double>},
    {weight_depths<float>, weight_depths<bfloat16>, weight_depths<float16>, weight_depths<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
