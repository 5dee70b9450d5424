// Rows of the weight and their biases, packed for the products of both passes (core/simd/packed_matrix.h). Per-level code.
#pragma once

#include "core/simd/packed_matrix.h"
#include "ops/slm_loss/params.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// Rows [begin, end) of the weight: words of the vocabulary.
template <class T>
FASTLM_INLINE Rows<T> words_of(const slm_loss::Params& p, int64_t begin, int64_t end) {
  return {static_cast<const T*>(p.weight) + begin * p.weight_row_stride,
          nullptr,
          p.weight_row_stride,
          p.weight_col_stride,
          end - begin,
          p.hidden_size};
}

// Their biases [from, to) in the accumulation type; 0 where there is none and beyond the end.
template <class A>
void pack_bias(const slm_loss::Params& p, int64_t begin, int64_t end, A* out, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    out[i] = begin + i < end ? load_param<A>(p.bias, p.bias_dtype, (begin + i) * p.bias_stride) : A(0);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
