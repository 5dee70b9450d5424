// slm_loss on CPU: checks -> parameters -> kernels of the CPU level in use. The forward pass needs no more than pieces of work
// that know nothing of each other; the backward pass is a pipeline over panels of the vocabulary, so that no thread waits at the
// end of a product. Sums run over fixed runs of rows or words in order: no result depends on the number of threads.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "adapter/parallel.h"
#include "adapter/pipeline.h"
#include "adapter/tensor.h"
#include "ops/slm_loss/checks.h"
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/select.h"

namespace fastlm::slm_loss {
namespace {

// Tokens whose packed hidden states and block statistics the forward pass holds at a time.
constexpr int64_t kChunk = 21 * kTokenBlock;

int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Tokens that count, and scratch memory that lives as long as the call.
struct Work {
  std::vector<int64_t> positions;
  std::vector<int64_t> labels;
  std::vector<Tensor> memory;
  Tensor like;

  void* bytes(int64_t n) {
    memory.push_back(empty({std::max<int64_t>(n, 1)}, ScalarType::Byte, like));
    return memory.back().data_ptr();
  }
};

struct Sizes {
  int64_t operand_bytes;  // also the size of the accumulation type
  int64_t columns;        // N
  int64_t elements;       // per operand
  int64_t depth;          // operands of one row of h values
  int64_t padded_hidden;
};

Sizes find_sizes(ScalarType dtype, int64_t hidden_size) {
  const auto& pack = FASTLM_CPU_KERNELS(slm_loss_pack);
  const int k = kernel_index(dtype);
  return {dtype == ScalarType::Double ? 8 : 4, pack.columns[k], pack.elements[k], ceil_div(hidden_size, pack.elements[k]),
          round_up(hidden_size, pack.columns[k])};
}

// hidden as (T, h): a view wherever the strides allow one.
Tensor as_rows(const Tensor& hidden) {
  const int64_t hidden_size = hidden.size(hidden.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < hidden.dim(); ++i) tokens *= hidden.size(i);
  return torch::stable::reshape(hidden, {tokens, hidden_size});
}

// Everything but the tokens of this call; `most_tokens` of them are held at a time.
void fill(Params& p, Work& work, const Sizes& sizes, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
          double softcap, int64_t most_tokens) {
  p.hidden_size = hidden.size(1);
  p.vocab = weight.size(0);
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
  p.capacity = round_up(most_tokens, kTokenBlock);
  p.hidden_columns = work.bytes(p.capacity * sizes.depth * sizes.operand_bytes);
}

void take_tokens(Params& p, const Work& work, int64_t begin, int64_t end) {
  p.num_tokens = end - begin;
  p.positions = work.positions.data() + begin;
  p.labels = work.labels.data() + begin;
}

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
    work.positions.push_back(static_cast<int64_t>(i));
    work.labels.push_back(values[i]);
  }
  const ScalarType dtype = hidden.scalar_type();
  const ScalarType acc = loss_dtype(hidden);
  const bool all = work.positions.size() == values.size();
  const auto output = [&] { return all ? empty(shape_of(labels), acc, hidden) : zeros(shape_of(labels), acc, hidden); };
  const Tensor nll = output();
  const Tensor lse = output();
  const Tensor entropy = return_entropy ? output() : no_tensor(acc, hidden);
  const auto total = static_cast<int64_t>(work.positions.size());
  if (total == 0) return {nll, lse, entropy};

  const Tensor flat = as_rows(hidden);
  const Sizes sizes = find_sizes(dtype, flat.size(1));
  ForwardParams p{};
  const int64_t chunk = round_up(ceil_div(total, ceil_div(total, kChunk)), kTokenBlock);
  fill(p, work, sizes, flat, weight, bias, softcap, std::min(chunk, total));
  p.entropy = return_entropy;
  const int64_t blocks = ceil_div(p.vocab, kWordBlock);
  p.block_max = work.bytes(blocks * p.capacity * sizes.operand_bytes);
  p.block_sum = work.bytes(blocks * p.capacity * sizes.operand_bytes);
  if (return_entropy) p.block_weighted = work.bytes(blocks * p.capacity * sizes.operand_bytes);
  p.label_logit = work.bytes(p.capacity * sizes.operand_bytes);
  p.nll = nll.data_ptr();
  p.lse = lse.data_ptr();
  p.entropy_out = return_entropy ? entropy.data_ptr() : nullptr;

  const auto& pack = FASTLM_CPU_KERNELS(slm_loss_pack);
  const auto& kernels = FASTLM_CPU_KERNELS(slm_loss_forward);
  const int k = kernel_index(dtype);
  for (int64_t begin = 0; begin < total; begin += chunk) {
    take_tokens(p, work, begin, std::min(begin + chunk, total));
    const int64_t token_blocks = ceil_div(p.num_tokens, kTokenBlock);
    run_pieces(op, token_blocks, [&](int64_t piece) { pack.hidden[k](p, piece); });
    run_pieces(op, blocks, [&](int64_t piece) { kernels.logits[k](p, piece); });
    run_pieces(op, token_blocks, [&](int64_t piece) { kernels.finish[k](p, piece); });
  }
  return {nll, lse, entropy};
}

// Tokens whose loss has a gradient: the others cost nothing and get exactly zero.
void keep_tokens_with_gradient(Work& work, const BackwardParams& p, const std::vector<int64_t>& values, int64_t ignore_index,
                               ScalarType acc) {
  const auto any = [&]<class A>() {
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] == ignore_index) continue;
      bool wanted = false;
      for (const void* grad : {p.dnll, p.dlse, p.dentropy}) {
        wanted = wanted || (grad != nullptr && static_cast<const A*>(grad)[i] != A(0));  // true for NaN as well
      }
      if (!wanted) continue;
      work.positions.push_back(static_cast<int64_t>(i));
      work.labels.push_back(values[i]);
    }
  };
  acc == ScalarType::Double ? any.template operator()<double>() : any.template operator()<float>();
}

// The backward pass over panels 0 .. n-1 of the vocabulary. Slot t of the pipeline holds five phases:
//   dlogits(t-1)   pack rows(t)   dhidden(t-2)   dweight and dbias(t-2)   pack depths(t)
// so that whatever a phase needs was begun at least one product earlier. What serves both products from one layout (floats) is
// triple-buffered. bf16 pairs have one layout for each, and two buffers of each do, but for the last to be read, dlogits for
// dweight.
class Pipeline {
 public:
  Pipeline(const BackwardParams& params, const Sizes& sizes, Work& work, ScalarType dtype)
      : p_(params),
        pack_(FASTLM_CPU_KERNELS(slm_loss_pack)),
        kernels_(FASTLM_CPU_KERNELS(slm_loss_backward)),
        k_(kernel_index(dtype)),
        token_blocks_(ceil_div(params.num_tokens, kTokenBlock)),
        hidden_blocks_(ceil_div(params.padded_hidden, kColumnBlock)) {
    // Wide enough for all threads to find work in one phase; sums run over pack.depth words at a time, whatever the width.
    const int64_t unit = pack_.depth[k_];
    const int64_t wanted = ceil_div(2 * static_cast<int64_t>(torch::stable::get_num_threads()), token_blocks_);
    size_ = unit * std::min({wanted, ceil_div(p_.vocab, unit), int64_t{8}});
    panels_ = ceil_div(p_.vocab, size_);
    pairs_ = sizes.elements == 2;
    weight_buffers_ = pairs_ ? 2 : 3;
    const int64_t run = sizes.columns * sizes.elements;  // values of one run of rows of A
    for (int i = 0; i < weight_buffers_; ++i) {
      weight_rows_[i] = work.bytes(size_ * round_up(sizes.depth, sizes.columns) * sizes.operand_bytes);
      bias_[i] = work.bytes(size_ * sizes.operand_bytes);
      weight_depths_[i] = weight_rows_[i];
      if (pairs_ && p_.dhidden != nullptr) {
        weight_depths_[i] = work.bytes(size_ / sizes.elements * p_.padded_hidden * sizes.operand_bytes);
      }
    }
    for (int i = 0; i < 3; ++i) {
      const auto bytes = [&](int64_t tokens) { return size_ * tokens / sizes.elements * sizes.operand_bytes; };
      if (!pairs_ || p_.dweight != nullptr) dlogits_rows_[i] = work.bytes(bytes(round_up(p_.capacity, run)));
      if (!pairs_) {
        dlogits_transposed_[i] = dlogits_rows_[i];
      } else if (p_.dhidden != nullptr && i < 2) {
        dlogits_transposed_[i] = work.bytes(bytes(p_.capacity));
      }
      if (p_.dbias != nullptr) dbias_blocks_[i] = work.bytes(token_blocks_ * size_ * sizes.operand_bytes);
    }
  }

  void run(const char* op) const {
    run_pipeline(
        op, 1 + 5 * (panels_ + 2), [this](int64_t i) { return phase_at(i); },
        [this](int64_t i, int64_t piece) { run_piece(i, piece); });
  }

 private:
  enum Kind : int64_t { kDlogits, kPackRows, kDhidden, kDweight, kPackDepths };

  static int64_t index(int64_t slot, Kind kind) { return slot < 0 ? 0 : 1 + 5 * slot + kind; }
  static int64_t panel_of(int64_t slot, Kind kind) {
    return kind == kDlogits ? slot - 1 : kind == kDhidden || kind == kDweight ? slot - 2 : slot;
  }

  Panel panel_at(int64_t i) const {
    const int64_t begin = i * size_;
    return {begin,
            std::min(begin + size_, p_.vocab),
            size_,
            weight_rows_[i % weight_buffers_],
            bias_[i % weight_buffers_],
            weight_depths_[i % weight_buffers_],
            dlogits_rows_[i % 3],
            dlogits_transposed_[i % (pairs_ ? 2 : 3)],
            dbias_blocks_[i % 3]};
  }

  Phase phase_at(int64_t i) const {
    if (i == 0) return {token_blocks_, -1};  // hidden states
    const int64_t slot = (i - 1) / 5;
    const auto kind = static_cast<Kind>((i - 1) % 5);
    const int64_t panel = panel_of(slot, kind);
    if (panel < 0 || panel >= panels_) return {0, -1};
    const int64_t words = std::min(size_, p_.vocab - panel * size_);
    switch (kind) {
      case kDlogits:  // its weights; its buffers were last read by dhidden(t-3) and in slot - 2
        return {token_blocks_ * ceil_div(words, kWordBlock), index(slot - 1, pairs_ ? kDhidden : kPackRows)};
      case kPackRows:  // the buffer's last reader: dlogits of the last panel but one, or dhidden of the one before
        return {ceil_div(words, kRowBlock), index(slot - 1, pairs_ ? kDlogits : kDhidden)};
      case kDhidden:  // the sum so far; dlogits and weights are older
        return {p_.dhidden == nullptr ? 0 : ceil_div(p_.num_tokens, kRowBlock) * hidden_blocks_, index(slot - 1, kDhidden)};
      case kDweight:  // dlogits
        return {weight_pieces(words) + bias_pieces(words), index(slot - 1, kDlogits)};
      default:  // the buffer's last reader
        return {p_.dhidden == nullptr || !pairs_ ? 0 : ceil_div(words, kRowBlock), index(slot, kDhidden)};
    }
  }

  int64_t weight_pieces(int64_t words) const { return p_.dweight == nullptr ? 0 : ceil_div(words, kRowBlock) * hidden_blocks_; }
  int64_t bias_pieces(int64_t words) const { return p_.dbias == nullptr ? 0 : ceil_div(words, kWordBlock); }

  void run_piece(int64_t i, int64_t piece) const {
    if (i == 0) {
      pack_.hidden[k_](p_, piece);
      return kernels_.tokens[k_](p_, piece);
    }
    const auto kind = static_cast<Kind>((i - 1) % 5);
    const Panel panel = panel_at(panel_of((i - 1) / 5, kind));
    switch (kind) {
      case kDlogits:
        return kernels_.dlogits[k_](p_, panel, piece);
      case kPackRows:
        return pack_.weight_rows[k_](p_, panel, piece);
      case kDhidden:
        return kernels_.dhidden[k_](p_, panel, piece);
      case kDweight: {
        const int64_t weights = weight_pieces(panel.end - panel.begin);
        return piece < weights ? kernels_.dweight[k_](p_, panel, piece) : kernels_.dbias[k_](p_, panel, piece - weights);
      }
      default:
        return pack_.weight_depths[k_](p_, panel, piece);
    }
  }

  const BackwardParams& p_;
  const PackKernels& pack_;
  const BackwardKernels& kernels_;
  int k_;
  int64_t token_blocks_, hidden_blocks_;
  int64_t size_, panels_;
  bool pairs_;  // of bf16: two layouts where floats have one
  int weight_buffers_;
  void* weight_rows_[3] = {};
  void* bias_[3] = {};
  void* weight_depths_[3] = {};
  void* dlogits_rows_[3] = {};
  void* dlogits_transposed_[3] = {};
  void* dbias_blocks_[3] = {};
};

std::tuple<Tensor, Tensor, Tensor> backward(OptionalTensor dnll, OptionalTensor dlse, OptionalTensor dentropy, Tensor hidden,
                                            Tensor weight, Tensor labels, OptionalTensor bias, Tensor lse, Tensor entropy,
                                            int64_t ignore_index, double softcap, bool need_dhidden, bool need_dweight,
                                            bool need_dbias) {
  constexpr const char* op = "linear_nll_backward";
  check_head(op, hidden, weight, labels, bias, softcap);
  check_backward(dnll, dlse, dentropy, hidden, labels, lse, entropy);
  const ScalarType dtype = hidden.scalar_type();
  const ScalarType acc = loss_dtype(hidden);
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
  keep_tokens_with_gradient(work, p, values, ignore_index, acc);

  const auto total = static_cast<int64_t>(work.positions.size());
  const auto output = [&](bool needed, const std::vector<int64_t>& shape, ScalarType type, bool written) {
    if (!needed) return no_tensor(type, hidden);
    return written ? empty(shape, type, hidden) : zeros(shape, type, hidden);
  };
  const Tensor dhidden = output(need_dhidden, shape_of(hidden), dtype, work.positions.size() == values.size());
  const Tensor dweight = output(need_dweight, shape_of(weight), dtype, total > 0);
  const Tensor dbias = output(need_dbias, {weight.size(0)}, bias.has_value() ? bias->scalar_type() : acc, total > 0);
  if (total == 0 || !(need_dhidden || need_dweight || need_dbias)) return {dhidden, dweight, dbias};

  const Tensor flat = as_rows(hidden);
  const Sizes sizes = find_sizes(dtype, flat.size(1));
  fill(p, work, sizes, flat, weight, bias, softcap, total);
  take_tokens(p, work, 0, total);
  p.padded_hidden = sizes.padded_hidden;
  p.per_token = work.bytes(5 * p.capacity * sizes.operand_bytes);
  if (need_dhidden) {
    p.dhidden_sum = work.bytes(p.capacity * sizes.padded_hidden * sizes.operand_bytes);
    p.dhidden = dhidden.data_ptr();
  }
  if (need_dweight) {
    p.hidden_depths = work.bytes(p.capacity / sizes.elements * sizes.padded_hidden * sizes.operand_bytes);
    p.dweight = dweight.data_ptr();
  }
  if (need_dbias) p.dbias = dbias.data_ptr();
  Pipeline(p, sizes, work, dtype).run(op);
  return {dhidden, dweight, dbias};
}

// Tokens of a whole call, or those of each sequence: their choice takes one read per 11 bits of the scores.
std::tuple<Tensor, Tensor, Tensor> select(Tensor score, Tensor eligible, OptionalTensor cu_seqlens, double keep_ratio,
                                          std::string tie_break, int64_t seed) {
  constexpr const char* op = "select_tokens";
  const bool random_ties = check_select(op, score, eligible, cu_seqlens, keep_ratio, tie_break);
  const ScalarType acc = accumulation_dtype(score.scalar_type());
  const int64_t total = score.numel();
  const std::vector<int64_t> ends =
      cu_seqlens.has_value() ? check_cu_seqlens(op, "cu_seqlens", *cu_seqlens, total) : std::vector<int64_t>{0, total};
  const auto segments = static_cast<int64_t>(ends.size()) - 1;
  const Tensor scores = torch::stable::contiguous(torch::stable::to(score, acc));
  const Tensor allowed = torch::stable::contiguous(eligible);
  const Tensor mask = empty(shape_of(score), ScalarType::Bool, score);
  const Tensor threshold = empty({segments}, acc, score);
  const Tensor counts = empty({segments, 3}, ScalarType::Long, score);
  const auto run = [&]<class Score, class Key>() {
    std::vector<Key> keys(static_cast<size_t>(total));
    parallel_for(op, total, 1 << 15, [&](int64_t begin, int64_t end) {
      keys_of(data<Score>(scores) + begin, data<bool>(allowed) + begin, end - begin, keys.data() + begin);
    });
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t begin = ends[static_cast<size_t>(s)];
      Key least;
      const Selection done =
          select_largest(keys.data() + begin, ends[static_cast<size_t>(s) + 1] - begin, keep_ratio, random_ties,
                         static_cast<uint64_t>(seed), begin, mutable_data<bool>(mask) + begin, &least);
      mutable_data<Score>(threshold)[s] = done.selected > 0 ? score_of(least) : std::numeric_limits<Score>::infinity();
      int64_t* count = mutable_data<int64_t>(counts) + 3 * s;
      count[0] = done.eligible;
      count[1] = done.selected;
      count[2] = done.tied;
    }
  };
  acc == ScalarType::Double ? run.template operator()<double, uint64_t>() : run.template operator()<float, uint32_t>();
  return {mask, threshold, counts};
}

}  // namespace
}  // namespace fastlm::slm_loss

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear_nll", TORCH_BOX(&fastlm::slm_loss::forward));
  m.impl("linear_nll_backward", TORCH_BOX(&fastlm::slm_loss::backward));
  m.impl("select_tokens", TORCH_BOX(&fastlm::slm_loss::select));
}
