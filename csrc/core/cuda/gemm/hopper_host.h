// What the sm_90a backend asks of a product, and the tensor maps of its operands.
#pragma once

#include "core/cuda/gemm/problem.h"
#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"

// FASTLM_HOPPER_KERNELS: the build has CUTLASS's headers and compiles for sm_90a (cmake/FastlmCuda.cmake).
#if defined(FASTLM_EMULATE_CUDA) && !defined(FASTLM_HOPPER_KERNELS)
#define FASTLM_HOPPER_KERNELS
#endif

namespace fastlm::cuda::gemm {

constexpr int kHopperRows = 128, kHopperDepth = 64;

// `lines` lines of `elements` of `m`, a matrix for each of `groups`, as boxes of 64 elements of `box` lines. A dimension of one
// element never moves: its stride may be anything that is allowed, and is that of the dimension inside of it.
inline TensorShape operand_shape(const Matrix& m, int64_t elements, int64_t lines, int64_t groups, int box) {
  if (m.group_stride == 0) groups = 1;
  const int64_t line = lines == 1 ? (elements + 7) / 8 * 16 : m.line_stride * 2, group = groups == 1 ? line : m.group_stride * 2;
  return {m.data, {elements, lines, groups, 1}, {line, group, group}, {64, box, 1, 1}};
}

inline TensorShape left_shape(const RowProduct& p) {
  return operand_shape({p.a.data, p.a.line_stride, 0, nullptr, 0}, p.k, p.rows.rows, 1, kHopperRows);
}
// `box`: columns of a copy where B lies by depth.
inline TensorShape right_shape(const RowProduct& p, Layout b, int parts, int box) {
  return b == Layout::kDepth ? operand_shape(p.b, p.k, parts * p.n, p.rows.groups, box)
                             : operand_shape(p.b, parts * p.n, p.k, p.rows.groups, kHopperDepth);
}
inline TensorShape outer_shape(const OuterProduct& p, const Matrix& m, int64_t width) {
  return operand_shape({m.data, m.line_stride, 0, nullptr, 0}, width, p.rows.rows, 1, kHopperDepth);
}

#ifdef FASTLM_HOPPER_KERNELS

// Sizes fit the 32-bit coordinates of tile copies, with room for what tiles reach beyond the end.
inline bool hopper_device(DType dtype) {
  return current_device().major == 9 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16);
}
inline bool hopper_size(int64_t n) { return n > 0 && n < int64_t{1} << 29; }

inline bool hopper_applies(const RowProduct& p, DType dtype, Layout b, int parts) {
  return hopper_device(dtype) && p.a.index == nullptr && p.b.index == nullptr && hopper_size(p.n) && hopper_size(p.k) &&
         hopper_size(p.rows.rows) && hopper_size(p.rows.groups) && has_tensor_map(left_shape(p)) &&
         has_tensor_map(right_shape(p, b, parts, 64));
}
inline bool hopper_applies(const OuterProduct& p, DType dtype) {
  return hopper_device(dtype) && p.a.index == nullptr && p.b.index == nullptr && hopper_size(p.n) && hopper_size(p.m) &&
         hopper_size(p.rows.rows) && hopper_size(p.rows.groups) && has_tensor_map(outer_shape(p, p.a, p.m)) &&
         has_tensor_map(outer_shape(p, p.b, p.n));
}

#else

inline bool hopper_applies(const RowProduct&, DType, Layout, int) { return false; }
inline bool hopper_applies(const OuterProduct&, DType) { return false; }

#endif

}  // namespace fastlm::cuda::gemm
