// slm_loss on CPU: checks -> parameters -> kernels of the CPU level in use. The loops over panels of the vocabulary and groups of
// rows are here; the pieces of each step are handed to whichever thread is free, which changes no result.
#include <algorithm>
#include <atomic>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/tensor.h"
#include "ops/slm_loss/checks.h"
#include "ops/slm_loss/cpu/kernels.h"

namespace fastlm::slm_loss {
namespace {

// Packed operands that are read again and again should stay in the last-level cache.
constexpr int64_t kPanelBytes = int64_t{4} << 20;
constexpr int64_t kGroupBytes = int64_t{8} << 20;
constexpr int64_t kMaxPanel = 5 * kColumnBlock;
constexpr int64_t kMaxGroup = 21 * kRowBlock;

int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Calls f(piece, piece + 1) for every piece; free threads take the next one.
template <class F>
void each_piece(int64_t pieces, const F& f) {
  const int64_t workers = std::min<int64_t>(pieces, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t piece = next++; piece < pieces; piece = next++) f(piece, piece + 1);
    }
  });
}

// Tokens that count, and scratch memory that lives as long as the call.
struct Work {
  std::vector<int64_t> rows;
  std::vector<int64_t> labels;
  std::vector<Tensor> memory;
  Tensor like;

  void* bytes(int64_t n) {
    memory.push_back(empty({std::max<int64_t>(n, 1)}, ScalarType::Byte, like));
    return memory.back().data_ptr();
  }
};

struct Sizes {
  int64_t acc_bytes;  // also the size of a word
  int64_t columns;    // N
  int64_t elements;   // per word
  int64_t words;      // of one row of h elements
  int64_t padded_hidden;
};

Sizes find_sizes(const Tensor& hidden) {
  const auto& pack = FASTLM_CPU_KERNELS(slm_loss_pack);
  const int k = kernel_index(hidden.scalar_type());
  const int64_t hidden_size = hidden.size(hidden.dim() - 1);
  return {hidden.scalar_type() == ScalarType::Double ? 8 : 4, pack.columns[k], pack.elements[k],
          ceil_div(hidden_size, pack.elements[k]), round_up(hidden_size, pack.columns[k])};
}

// hidden as (T, h): a view wherever the strides allow one.
Tensor as_rows(const Tensor& hidden) {
  const int64_t hidden_size = hidden.size(hidden.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < hidden.dim(); ++i) tokens *= hidden.size(i);
  return torch::stable::reshape(hidden, {tokens, hidden_size});
}

void fill(Params& p, Work& work, const Sizes& sizes, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
          double softcap) {
  p.hidden_size = hidden.size(1);
  p.vocab = weight.size(0);
  p.num_rows = static_cast<int64_t>(work.rows.size());
  p.rows = work.rows.data();
  p.labels = work.labels.data();
  p.hidden = hidden.data_ptr();
  p.hidden_row_stride = hidden.stride(0);
  p.hidden_col_stride = hidden.stride(1);
  p.weight = weight.data_ptr();
  p.weight_row_stride = weight.stride(0);
  p.weight_col_stride = weight.stride(1);
  if (bias.has_value()) {
    p.bias = bias->data_ptr();
    p.bias_dtype = param_dtype(*bias);
    p.bias_stride = bias->stride(0);
  }
  p.softcap = softcap;

  // Equal panels and groups, no larger than the budgets say.
  const int64_t row_bytes = std::max<int64_t>(1, sizes.words * sizes.acc_bytes);
  const int64_t panel_limit = std::clamp(kPanelBytes / row_bytes / kColumnBlock * kColumnBlock, kColumnBlock, kMaxPanel);
  p.panel_size = round_up(ceil_div(p.vocab, ceil_div(p.vocab, panel_limit)), kColumnBlock);
  const int64_t group_limit = std::clamp(kGroupBytes / row_bytes / kRowBlock * kRowBlock, 4 * kRowBlock, kMaxGroup);
  p.group_size = round_up(ceil_div(p.num_rows, ceil_div(p.num_rows, group_limit)), kRowBlock);

  p.hidden_rows = work.bytes(round_up(sizes.words, sizes.columns) * p.group_size * sizes.acc_bytes);
  p.weight_columns = work.bytes(p.panel_size * sizes.words * sizes.acc_bytes);
  p.bias_packed = work.bytes(p.panel_size * sizes.acc_bytes);
}

// Calls f(step) for every panel and, inside it, every group, with both packed.
template <class F, class G>
void each_step(const Params& p, ScalarType dtype, const F& step_body, const G& panel_end) {
  const auto& pack = FASTLM_CPU_KERNELS(slm_loss_pack);
  const int k = kernel_index(dtype);
  const bool one_group = p.group_size >= p.num_rows;
  for (int64_t v = 0; v < p.vocab; v += p.panel_size) {
    const int64_t v_end = std::min(v + p.panel_size, p.vocab);
    const Step panel{0, 0, v, v_end};
    each_piece(ceil_div(v_end - v, kRowBlock), [&](int64_t begin, int64_t end) { pack.weight[k](p, panel, begin, end); });
    for (int64_t r = 0; r < p.num_rows; r += p.group_size) {
      const Step step{r, std::min(r + p.group_size, p.num_rows), v, v_end};
      if (v == 0 || !one_group) {
        each_piece(ceil_div(step.row_end - r, kRowBlock),
                   [&](int64_t begin, int64_t end) { pack.hidden[k](p, step, begin, end); });
      }
      step_body(step);
    }
    panel_end(panel);
  }
}

int64_t row_blocks(const Step& s) { return ceil_div(s.row_end - s.row_begin, kRowBlock); }
int64_t column_blocks(const Step& s) { return ceil_div(s.vocab_end - s.vocab_begin, kColumnBlock); }

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor labels, OptionalTensor bias, int64_t ignore_index,
                                           double softcap, bool return_entropy) {
  constexpr const char* op = "linear_nll";
  check_head(op, hidden, weight, labels, bias, softcap);
  const std::vector<int64_t> values = label_values(op, labels, weight.size(0), ignore_index);
  Work work{{}, {}, {}, hidden};
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == ignore_index) continue;
    work.rows.push_back(static_cast<int64_t>(i));
    work.labels.push_back(values[i]);
  }
  const ScalarType dtype = hidden.scalar_type();
  const ScalarType acc = loss_dtype(hidden);
  const bool all = work.rows.size() == values.size();
  const auto output = [&] { return all ? empty(shape_of(labels), acc, hidden) : zeros(shape_of(labels), acc, hidden); };
  const Tensor nll = output();
  const Tensor lse = output();
  const Tensor entropy = return_entropy ? output() : no_tensor(acc, hidden);
  if (work.rows.empty()) return {nll, lse, entropy};

  const Tensor flat = as_rows(hidden);
  const Sizes sizes = find_sizes(hidden);
  ForwardParams p{};
  fill(p, work, sizes, flat, weight, bias, softcap);
  p.entropy = return_entropy;
  const int64_t block_stats = p.panel_size / kColumnBlock * p.group_size * sizes.acc_bytes;
  const int64_t row_stats = p.num_rows * sizes.acc_bytes;
  p.block_max = work.bytes(block_stats);
  p.block_sum = work.bytes(block_stats);
  p.row_max = work.bytes(row_stats);
  p.row_sum = work.bytes(row_stats);
  p.row_label = work.bytes(row_stats);
  if (return_entropy) {
    p.block_weighted = work.bytes(block_stats);
    p.row_weighted = work.bytes(row_stats);
    p.entropy_out = entropy.data_ptr();
  }
  p.nll = nll.data_ptr();
  p.lse = lse.data_ptr();

  const auto& kernels = FASTLM_CPU_KERNELS(slm_loss_forward);
  const int k = kernel_index(dtype);
  each_step(
      p, dtype,
      [&](const Step& s) {
        each_piece(row_blocks(s) * column_blocks(s), [&](int64_t begin, int64_t end) { kernels.logits[k](p, s, begin, end); });
        each_piece(row_blocks(s), [&](int64_t begin, int64_t end) { kernels.merge[k](p, s, begin, end); });
      },
      [](const Step&) {});
  kernels.finish[k](p, Step{0, p.num_rows, 0, p.vocab}, 0, ceil_div(p.num_rows, kRowBlock));
  return {nll, lse, entropy};
}

// Tokens whose loss has a gradient: the others cost nothing and get exactly zero.
void keep_rows_with_gradient(Work& work, const BackwardParams& p, const std::vector<int64_t>& values, int64_t ignore_index,
                             ScalarType acc) {
  const auto any = [&]<class A>() {
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] == ignore_index) continue;
      bool wanted = false;
      for (const void* grad : {p.dnll, p.dlse, p.dentropy}) {
        wanted = wanted || (grad != nullptr && static_cast<const A*>(grad)[i] != A(0));  // true for NaN as well
      }
      if (!wanted) continue;
      work.rows.push_back(static_cast<int64_t>(i));
      work.labels.push_back(values[i]);
    }
  };
  acc == ScalarType::Double ? any.template operator()<double>() : any.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor> backward(OptionalTensor dnll, OptionalTensor dlse, OptionalTensor dentropy, Tensor hidden,
                                            Tensor weight, Tensor labels, OptionalTensor bias, Tensor lse, Tensor entropy,
                                            int64_t ignore_index, double softcap, bool need_dhidden, bool need_dweight,
                                            bool need_dbias) {
  constexpr const char* op = "linear_nll_backward";
  check_head(op, hidden, weight, labels, bias, softcap);
  check_backward(dnll, dlse, dentropy, hidden, labels, lse, entropy);
  const ScalarType dtype = hidden.scalar_type();
  const ScalarType acc = loss_dtype(hidden);
  const int k = kernel_index(dtype);
  const std::vector<int64_t> values = label_values(op, labels, weight.size(0), ignore_index);
  need_dbias = need_dbias && bias.has_value();

  Work work{{}, {}, {}, hidden};
  BackwardParams p{};
  const auto per_token = [&](const OptionalTensor& t) -> const void* {
    if (!t.has_value()) return nullptr;
    work.memory.push_back(torch::stable::contiguous(*t));
    return work.memory.back().data_ptr();
  };
  p.dnll = per_token(dnll);
  p.dlse = per_token(dlse);
  p.dentropy = per_token(dentropy);
  p.lse = per_token(lse);
  p.entropy = dentropy.has_value();
  if (p.entropy) p.entropy_in = per_token(entropy);
  keep_rows_with_gradient(work, p, values, ignore_index, acc);

  const bool none = work.rows.empty();
  const auto output = [&](bool needed, const std::vector<int64_t>& shape, ScalarType type, bool complete) {
    if (!needed) return no_tensor(type, hidden);
    return complete && !none ? empty(shape, type, hidden) : zeros(shape, type, hidden);
  };
  const Tensor dhidden = output(need_dhidden, shape_of(hidden), dtype, work.rows.size() == values.size());
  const Tensor dweight = output(need_dweight, shape_of(weight), dtype, true);
  const Tensor dbias = output(need_dbias, {weight.size(0)}, bias.has_value() ? bias->scalar_type() : acc, true);
  if (none || !(need_dhidden || need_dweight || need_dbias)) return {dhidden, dweight, dbias};

  const Tensor flat = as_rows(hidden);
  const Sizes sizes = find_sizes(hidden);
  fill(p, work, sizes, flat, weight, bias, softcap);
  p.padded_hidden = sizes.padded_hidden;
  const bool pairs = sizes.elements == 2;
  // Pairs of bf16 need two layouts where floats need one; each is half as large.
  const int64_t dlogits_bytes = p.panel_size / sizes.elements * p.group_size * sizes.acc_bytes;
  if (need_dhidden) {
    p.weight_rows = work.bytes(p.panel_size / sizes.elements * sizes.padded_hidden * sizes.acc_bytes);
    p.dhidden_sum = work.bytes(round_up(p.num_rows, kRowBlock) * sizes.padded_hidden * sizes.acc_bytes);
    p.dhidden = dhidden.data_ptr();
  }
  if (need_dweight) {
    p.hidden_columns = pairs ? work.bytes(p.group_size / 2 * sizes.padded_hidden * sizes.acc_bytes) : p.hidden_rows;
    p.dweight_sum = work.bytes(p.panel_size * sizes.padded_hidden * sizes.acc_bytes);
    p.dweight = dweight.data_ptr();
  }
  if (!pairs || need_dhidden) p.dlogits_rows = work.bytes(dlogits_bytes);
  p.dlogits_transposed = pairs ? (need_dweight ? work.bytes(dlogits_bytes) : nullptr) : p.dlogits_rows;
  if (need_dbias) {
    p.dbias_sum = work.bytes((p.group_size / kRowBlock + 1) * p.panel_size * sizes.acc_bytes);
    p.dbias = dbias.data_ptr();
  }

  const auto& kernels = FASTLM_CPU_KERNELS(slm_loss_backward);
  const int64_t hidden_blocks = ceil_div(p.padded_hidden, kColumnBlock);
  const auto run = [&](Backward kernel, const Step& s, int64_t pieces) {
    each_piece(pieces, [&](int64_t begin, int64_t end) { kernel(p, s, begin, end); });
  };
  each_step(
      p, dtype,
      [&](const Step& s) {
        run(kernels.dlogits[k], s, row_blocks(s) * column_blocks(s));
        if (need_dhidden) run(kernels.dhidden[k], s, row_blocks(s) * hidden_blocks);
        if (need_dweight) run(kernels.dweight[k], s, ceil_div(s.vocab_end - s.vocab_begin, kRowBlock) * hidden_blocks);
        if (need_dbias) run(kernels.dbias[k], s, column_blocks(s));
      },
      [&](const Step& panel) {
        if (!need_dweight && !need_dbias) return;
        run(kernels.write_dweight[k], panel, ceil_div(panel.vocab_end - panel.vocab_begin, kRowBlock));
      });
  if (need_dhidden) run(kernels.write_dhidden[k], Step{0, p.num_rows, 0, p.vocab}, ceil_div(p.num_rows, kRowBlock));
  return {dhidden, dweight, dbias};
}

}  // namespace
}  // namespace fastlm::slm_loss

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear_nll", TORCH_BOX(&fastlm::slm_loss::forward));
  m.impl("linear_nll_backward", TORCH_BOX(&fastlm::slm_loss::backward));
}
