// linear_nll on CUDA: checks -> parameters -> launch. The values of labels are not checked, since that would stop the device:
// what is no word of the vocabulary counts as ignored.
#include "adapter/cuda.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "adapter/tensor.h"
#include "ops/slm_loss/checks.h"
#include "ops/slm_loss/cuda/compact.h"
#include "ops/slm_loss/cuda/nll.h"

namespace fastlm::slm_loss {
namespace {

DType dtype_of(const Tensor& x) { return static_cast<DType>(kernel_index(x.scalar_type())); }

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Scratch memory and copies that live until the launches are made; torch's allocator keeps them for the stream.
class Memory {
 public:
  explicit Memory(const Tensor& like) : like_(like) {}

  void* bytes(int64_t n) { return kept(empty({std::max<int64_t>(n, 1)}, ScalarType::Byte, like_)); }
  void* kept(const Tensor& t) {
    tensors_.push_back(t);
    return t.data_ptr();
  }
  const void* contiguous(const OptionalTensor& t) { return t.has_value() ? kept(torch::stable::contiguous(*t)) : nullptr; }

 private:
  Tensor like_;
  std::vector<Tensor> tensors_;
};

// hidden as (T, h): a view wherever the strides allow one.
Tensor as_rows(const Tensor& hidden) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < hidden.dim(); ++i) tokens *= hidden.size(i);
  return torch::stable::reshape(hidden, {tokens, hidden.size(hidden.dim() - 1)});
}

cuda::Head fill_head(const char* op, Memory& memory, const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                     const OptionalTensor& bias, int64_t ignore_index, double softcap) {
  const Tensor rows = as_rows(hidden);
  const Tensor words = weight.size(1) <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  FASTLM_CHECK_VALUE(rows.size(0) <= most && weight.size(0) <= most, op, ": CUDA takes fewer than 2^31 tokens and words, got ",
                     rows.size(0), " and ", weight.size(0));
  cuda::Head head{};
  head.tokens = rows.size(0);
  head.hidden_size = rows.size(1);
  head.vocab = weight.size(0);
  head.hidden = memory.kept(rows);
  head.hidden_row_stride = rows.stride(0);
  head.hidden_col_stride = rows.stride(1);
  head.weight = memory.kept(words);
  head.weight_row_stride = words.stride(0);
  if (bias.has_value()) {
    head.bias = memory.contiguous(torch::stable::to(*bias, loss_dtype(hidden)));
  }
  head.softcap = softcap;
  head.labels = memory.contiguous(labels);
  head.labels_64 = labels.scalar_type() == ScalarType::Long;
  head.ignore_index = ignore_index;
  return head;
}

int64_t element_bytes(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
}

// Starts the choice of the tokens that take part.
cuda::Chosen choose(const char* op, Memory& memory, const cuda::Head& head, const cuda::TokenGradients& gradients,
                    const Tensor& hidden) {
  cuda::CompactParams p{};
  p.tokens = head.tokens;
  p.labels = head.labels;
  p.labels_64 = head.labels_64;
  p.ignore_index = head.ignore_index;
  p.vocab = head.vocab;
  p.gradients[0] = gradients.dnll;
  p.gradients[1] = gradients.dlse;
  p.gradients[2] = gradients.dentropy;
  p.doubles = hidden.scalar_type() == ScalarType::Double;
  p.positions = static_cast<int32_t*>(memory.bytes(4 * head.tokens));
  p.count = static_cast<int32_t*>(memory.bytes(4));
  p.workspace = memory.bytes(cuda::compact_workspace_bytes(head.tokens));
  check_launch(op, cuda::launch_compact(p, current_stream(hidden)));
  return {p.positions, p.count};
}

cuda::Wave take_wave(Memory& memory, int64_t rows, int64_t stride, const Tensor& hidden) {
  return {rows, stride, memory.bytes(rows * stride * element_bytes(hidden)), static_cast<int32_t*>(memory.bytes(4 * rows))};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor labels, OptionalTensor bias, int64_t ignore_index,
                                           double softcap, bool return_entropy) {
  constexpr const char* op = "linear_nll";
  check_head(op, hidden, weight, labels, bias, softcap);
  const DeviceGuard guard(hidden.get_device_index());
  const ScalarType acc = loss_dtype(hidden);
  const DType dtype = dtype_of(hidden);
  const Tensor nll = zeros(shape_of(labels), acc, hidden);
  const Tensor lse = zeros(shape_of(labels), acc, hidden);
  const Tensor entropy = return_entropy ? zeros(shape_of(labels), acc, hidden) : no_tensor(acc, hidden);
  if (nll.numel() == 0 || weight.size(0) == 0) return {nll, lse, entropy};

  Memory memory(hidden);
  cuda::ForwardCall call{};
  call.head = fill_head(op, memory, hidden, weight, labels, bias, ignore_index, softcap);
  call.chosen = choose(op, memory, call.head, {}, hidden);
  call.plan = cuda::plan_forward(call.head, dtype, return_entropy);
  call.wave = take_wave(memory, call.plan.rows, call.plan.stride, hidden);
  const int64_t row = call.plan.rows * (acc == ScalarType::Double ? 8 : 4);
  call.slab_max = memory.bytes(call.plan.slabs * row);
  call.slab_sum = memory.bytes(call.plan.slabs * row);
  if (return_entropy) call.slab_weighted = memory.bytes(call.plan.slabs * row);
  call.label_logit = memory.bytes(row);
  call.nll = nll.data_ptr();
  call.lse = lse.data_ptr();
  call.entropy = return_entropy ? entropy.data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(hidden);
  check_launch(op, cuda::launch_forward(call, dtype, stream));
  return {nll, lse, entropy};
}

std::tuple<Tensor, Tensor, Tensor> backward(OptionalTensor dnll, OptionalTensor dlse, OptionalTensor dentropy, Tensor hidden,
                                            Tensor weight, Tensor labels, OptionalTensor bias, Tensor lse, Tensor entropy,
                                            int64_t ignore_index, double softcap, bool need_dhidden, bool need_dweight,
                                            bool need_dbias) {
  constexpr const char* op = "linear_nll_backward";
  check_head(op, hidden, weight, labels, bias, softcap);
  check_backward(dnll, dlse, dentropy, hidden, labels, lse, entropy);
  const DeviceGuard guard(hidden.get_device_index());
  const ScalarType type = hidden.scalar_type(), acc = loss_dtype(hidden);
  const DType dtype = dtype_of(hidden);
  need_dbias = need_dbias && bias.has_value();
  const ScalarType bias_type = bias.has_value() ? bias->scalar_type() : acc;
  const Tensor dhidden = need_dhidden ? zeros(shape_of(hidden), type, hidden) : no_tensor(type, hidden);
  if (labels.numel() == 0 || weight.size(0) == 0 || !(need_dhidden || need_dweight || need_dbias) ||
      !(dnll.has_value() || dlse.has_value() || dentropy.has_value())) {
    return {dhidden, need_dweight ? zeros(shape_of(weight), type, hidden) : no_tensor(type, hidden),
            need_dbias ? zeros({weight.size(0)}, bias_type, hidden) : no_tensor(bias_type, hidden)};
  }

  Memory memory(hidden);
  cuda::BackwardCall call{};
  call.head = fill_head(op, memory, hidden, weight, labels, bias, ignore_index, softcap);
  call.gradients = {memory.contiguous(dnll), memory.contiguous(dlse), memory.contiguous(dentropy), memory.contiguous(lse),
                    dentropy.has_value() ? memory.contiguous(entropy) : nullptr};
  call.chosen = choose(op, memory, call.head, call.gradients, hidden);
  call.plan = cuda::plan_backward(call.head, dtype);
  call.wave = take_wave(memory, call.plan.rows, call.plan.stride, hidden);
  const int64_t rows = call.plan.rows, element = element_bytes(hidden), acc_element = acc == ScalarType::Double ? 8 : 4;
  call.row_values = memory.bytes(cuda::kRowValues * rows * acc_element);
  call.dlogits = memory.bytes(rows * call.plan.words * element);
  if (type == ScalarType::Half) call.scale = static_cast<float*>(memory.bytes(8));
  if (need_dhidden) {
    call.dhidden_sum = memory.bytes(rows * call.head.hidden_size * acc_element);
    call.dhidden = dhidden.data_ptr();
  }
  // Sums of several waves stay in the accumulation type until the last one is in.
  const bool summed = need_dweight && (acc == type || call.head.tokens > rows);
  Tensor dweight = need_dweight ? empty(shape_of(weight), summed ? acc : type, hidden) : no_tensor(type, hidden);
  if (need_dweight) (summed ? call.dweight_sum : call.dweight) = dweight.data_ptr();
  Tensor dbias = need_dbias ? empty({weight.size(0)}, acc, hidden) : no_tensor(bias_type, hidden);
  if (need_dbias) {
    call.bias_slabs = memory.bytes(ceil_div(rows, 16) * call.plan.words * acc_element);
    call.dbias = dbias.data_ptr();
  }
  const cudaStream_t stream = current_stream(hidden);
  if (call.scale != nullptr) check_launch(op, cuda::launch_scale(call.head, call.gradients, call.scale, stream));
  check_launch(op, cuda::launch_backward(call, dtype, stream));
  if (need_dweight) dweight = torch::stable::to(dweight, type);
  if (need_dbias) dbias = torch::stable::to(dbias, bias_type);
  return {dhidden, dweight, dbias};
}

}  // namespace
}  // namespace fastlm::slm_loss

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("linear_nll", TORCH_BOX(&fastlm::slm_loss::forward));
  m.impl("linear_nll_backward", TORCH_BOX(&fastlm::slm_loss::backward));
}
