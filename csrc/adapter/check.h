// Argument checks: `FASTLM_CHECK_VALUE(cond, parts...)` throws std::invalid_argument, which Python sees as ValueError;
// `FASTLM_CHECK_INDEX` throws std::out_of_range (IndexError). Parts are joined into the text: operator, argument, expected value,
// found value. Everything is checked before a parallel region starts: an exception inside one would lose its type and text.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "adapter/tensor.h"

namespace fastlm {

template <class... Parts>
std::string join_text(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

#define FASTLM_CHECK_VALUE(cond, ...)                                           \
  do {                                                                          \
    if (!(cond)) throw std::invalid_argument(::fastlm::join_text(__VA_ARGS__)); \
  } while (false)

#define FASTLM_CHECK_INDEX(cond, ...)                                       \
  do {                                                                      \
    if (!(cond)) throw std::out_of_range(::fastlm::join_text(__VA_ARGS__)); \
  } while (false)

// The facts most operators check. `op` and `name` begin the text.
void check_floating(const char* op, const char* name, const Tensor& t);
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape_words);
void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape);
// Same dtype as the operator's main input (`main` is its name).
void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* main, const Tensor& like);
void check_same_device(const char* op, const char* name, const Tensor& t, const char* main, const Tensor& like);
// int32 or int64, one dimension.
void check_index_vector(const char* op, const char* name, const Tensor& t);

// Values of a small integer vector (cu_seqlens, cache_seqlens, slot indices) as int64, wherever it lives on the CPU.
std::vector<int64_t> index_values(const Tensor& t);

// cu_seqlens (S+1,) of `total` positions, as far as its shape tells: without a sequence there are no positions.
void check_cu_seqlens_shape(const char* op, const char* name, const Tensor& t, int64_t total);
// The same and its values: they start with 0, never decrease, end with `total`. Returns them.
std::vector<int64_t> check_cu_seqlens(const char* op, const char* name, const Tensor& t, int64_t total);

}  // namespace fastlm
