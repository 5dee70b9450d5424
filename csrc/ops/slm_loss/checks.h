// Argument checks of slm_loss, shared by the CPU and the CUDA twin.
#pragma once

#include <string>
#include <vector>

#include "adapter/check.h"
#include "ops/slm_loss/params.h"

namespace fastlm::slm_loss {

// Throws unless the call is sound; values of labels are not looked at.
void check_head(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& labels, const OptionalTensor& bias,
                double softcap);

void check_backward(const OptionalTensor& dnll, const OptionalTensor& dlse, const OptionalTensor& dentropy, const Tensor& hidden,
                    const Tensor& labels, const Tensor& lse, const Tensor& entropy);

// Throws unless the call is sound; returns whether ties are broken at random.
bool check_select(const char* op, const Tensor& score, const Tensor& eligible, const OptionalTensor& cu_seqlens,
                  double keep_ratio, const std::string& tie_break);

// float64 for float64, else float32: dtype of the per-token outputs.
ScalarType loss_dtype(const Tensor& hidden);

// Labels in the order of the tokens, each in [0, vocab) or ignore_index; on the CPU.
std::vector<int64_t> label_values(const char* op, const Tensor& labels, int64_t vocab, int64_t ignore_index);

}  // namespace fastlm::slm_loss
