// moe_dispatch on CUDA: checks -> what the products are -> launch. Offsets lie on the device and are not checked, since that
// would stop it; the kernels clamp them instead.
#include "adapter/cuda.h"

#include <tuple>

#include "adapter/tensor.h"
#include "ops/moe_dispatch/checks.h"
#include "ops/moe_dispatch/cuda/gemm.h"

namespace fastlm::moe_dispatch {
namespace {

namespace gemm = fastlm::cuda::gemm;

DType dtype_of(const Tensor& t) { return static_cast<DType>(kernel_index(t.scalar_type())); }

// `t` with unit stride along its last dimension.
Tensor unit_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

gemm::Matrix rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), 0, nullptr, t.size(0)}; }

// `offsets` is contiguous.
gemm::Ragged groups_of(const Tensor& offsets, int64_t rows) {
  return {offsets.data_ptr(), offsets.scalar_type() == ScalarType::Long, offsets.size(0) - 1, rows, nullptr, 0};
}

// One matrix for each group, whose columns count along one of dimensions 1 and 2 and whose depth along the other.
struct Weight {
  Tensor tensor;
  gemm::Matrix matrix;
  gemm::Layout layout;

  Weight(const Tensor& b, int columns) : tensor(b) {
    const auto flat = [&](int dim) { return tensor.stride(dim) == 1 || tensor.size(dim) <= 1; };
    if (!flat(1) && !flat(2)) tensor = torch::stable::contiguous(b);
    const int depth = 3 - columns;
    layout = flat(depth) ? gemm::Layout::kDepth : gemm::Layout::kWidth;
    const int lines = layout == gemm::Layout::kDepth ? columns : depth;
    matrix = {tensor.data_ptr(), tensor.stride(lines), tensor.stride(0), nullptr, tensor.size(lines)};
  }
};

Tensor grouped_gemm(Tensor a, Tensor b, Tensor offsets, bool trans_b) {
  constexpr const char* op = "grouped_gemm";
  check_grouped_gemm(op, a, b, offsets, trans_b);
  const DeviceGuard guard(a.get_device_index());
  const int columns = trans_b ? 1 : 2;
  const Tensor out = empty({a.size(0), b.size(columns)}, a.scalar_type(), a);
  const Tensor ends = torch::stable::contiguous(offsets);
  const Tensor rows = unit_rows(a);
  const Weight weight(b, columns);
  const gemm::RowProduct p{groups_of(ends, a.size(0)), out.size(1), a.size(1), rows_of(rows), weight.matrix};
  check_launch(op, cuda::launch_row_product(p, weight.layout, out.data_ptr(), dtype_of(a), current_stream(a)));
  return out;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(Tensor dout, Tensor a, Tensor b, Tensor offsets, bool trans_b, bool need_da,
                                                 bool need_db) {
  constexpr const char* op = "grouped_gemm_backward";
  check_grouped_gemm(op, a, b, offsets, trans_b);
  check_grouped_gemm_backward(dout, a, b, trans_b);
  const DeviceGuard guard(a.get_device_index());
  const ScalarType dtype = a.scalar_type();
  const Tensor da = need_da ? empty({a.size(0), a.size(1)}, dtype, a) : no_tensor(dtype, a);
  const Tensor db = need_db ? empty({b.size(0), b.size(1), b.size(2)}, dtype, a) : no_tensor(dtype, a);
  const Tensor ends = torch::stable::contiguous(offsets);
  const Tensor dout_rows = unit_rows(dout);
  if (need_da) {
    const Weight weight(b, trans_b ? 2 : 1);
    const gemm::RowProduct p{groups_of(ends, a.size(0)), a.size(1), dout.size(1), rows_of(dout_rows), weight.matrix};
    check_launch(op, cuda::launch_row_product(p, weight.layout, da.data_ptr(), dtype_of(a), current_stream(a)));
  }
  if (need_db) {
    const Tensor a_rows = unit_rows(a);
    const gemm::Matrix first = rows_of(trans_b ? dout_rows : a_rows), second = rows_of(trans_b ? a_rows : dout_rows);
    const gemm::OuterProduct p{groups_of(ends, a.size(0)), b.size(1), b.size(2), first, second};
    check_launch(op, cuda::launch_outer_product(p, db.data_ptr(), dtype_of(a), current_stream(a)));
  }
  return {da, db};
}

}  // namespace
}  // namespace fastlm::moe_dispatch

STABLE_TORCH_LIBRARY_IMPL(fastlm, FASTLM_CUDA_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&fastlm::moe_dispatch::grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&fastlm::moe_dispatch::grouped_gemm_backward));
}
