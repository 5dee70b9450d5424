// Launches of experts_rows.cuh, and the choice of the element type for the products.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/moe_dispatch/cuda/experts_rows.cuh"

namespace fastlm::moe_dispatch::cuda {
namespace {

using fastlm::cuda::launch;
using fastlm::cuda::limited;
using fastlm::cuda::visit_dtype;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 blocks(int64_t threads) { return dim3(static_cast<unsigned int>(ceil_div(threads, kRowThreads))); }

// Calls start.operator()<width>(grid, team) with the widest pieces of rows of `columns` elements that lie on 16 bytes.
template <class T, class Start>
cudaError_t start_rows(int64_t rows, int64_t columns, bool wide, const Start& start) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int width = wide ? kWideElements<T> : 1, team = RowTeams::fitting(ceil_div(columns, width));
  const dim3 grid(static_cast<unsigned int>(ceil_div(rows, kRowThreads / team)));
  return wide ? start.template operator()<kWideElements<T>>(grid, team) : start.template operator()<1>(grid, team);
}

template <class T>
bool whole_pieces(int64_t elements) {
  return elements % kWideElements<T> == 0;
}

}  // namespace

cudaError_t launch_gate(const GateCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() { return gate_of<T>(call, stream); });
}
cudaError_t launch_down(const DownCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() { return down_of<T>(call, stream); });
}
cudaError_t launch_gate_backward(const GateBackwardCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() { return gate_backward_of<T>(call, stream); });
}
cudaError_t launch_outer(const OuterCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() { return outer_of<T>(call, stream); });
}

cudaError_t launch_weights(const WeightsCall& call, DType dtype, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  return dtype == DType::kFloat64 ? launch<weights_kernel<double>>(blocks(call.rows), kRowThreads, 0, stream, call)
                                  : launch<weights_kernel<float>>(blocks(call.rows), kRowThreads, 0, stream, call);
}

cudaError_t launch_copy(const CopyCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() {
    const bool wide =
        whole_pieces<T>(call.columns) && whole_pieces<T>(call.row_stride) && aligned_16(call.from) && aligned_16(call.to);
    return start_rows<T>(call.rows.rows, call.columns, wide, [&]<int kWidth>(dim3 grid, int team) {
      return launch<copy_kernel<T, kWidth>>(grid, kRowThreads, 0, stream, call, team);
    });
  });
}

cudaError_t launch_clear(const ClearCall& call, DType dtype, cudaStream_t stream) {
  const int64_t elements = call.rows.rows * call.columns;
  if (elements == 0) return cudaSuccess;
  const dim3 grid(limited(ceil_div(elements, kRowThreads), 8 * fastlm::cuda::current_device().num_sms));
  return visit_dtype(dtype, [&]<class T>() { return launch<clear_kernel<T>>(grid, kRowThreads, 0, stream, call); });
}

cudaError_t launch_combine(const CombineCall& call, DType dtype, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>() {
    const bool wide = whole_pieces<T>(call.columns) && aligned_16(call.rows) && aligned_16(call.y);
    return start_rows<T>(call.tokens, call.columns, wide, [&]<int kWidth>(dim3 grid, int team) {
      if (call.top_k <= 2) return launch<combine_kernel<T, 2, kWidth>>(grid, kRowThreads, 0, stream, call, team);
      return launch<combine_kernel<T, 8, kWidth>>(grid, kRowThreads, 0, stream, call, team);
    });
  });
}

cudaError_t launch_sums(const SumsCall& call, DType dtype, cudaStream_t stream) {
  if (call.columns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned int>(call.rows.groups * call.splits * ceil_div(call.columns, kRowThreads)));
  const cudaError_t status =
      visit_dtype(dtype, [&]<class T>() { return launch<sums_kernel<T>>(grid, kRowThreads, 0, stream, call); });
  if (status != cudaSuccess) return status;
  const dim3 ends = blocks(call.rows.groups * call.columns);
  return dtype == DType::kFloat64 ? launch<finish_sums_kernel<double>>(ends, kRowThreads, 0, stream, call)
                                  : launch<finish_sums_kernel<float>>(ends, kRowThreads, 0, stream, call);
}

cudaError_t launch_pick_gradient(const PickGradientCall& call, DType dtype, cudaStream_t stream) {
  if (call.rows.rows == 0) return cudaSuccess;
  return visit_dtype(dtype, [&]<class T>() {
    if (call.bias == nullptr) {
      return launch<pick_gradient_kernel<T, false>>(blocks(call.rows.rows), kRowThreads, 0, stream, call);
    }
    return launch<pick_gradient_kernel<T, true>>(blocks(32 * call.rows.rows), kRowThreads, 0, stream, call);
  });
}

}  // namespace fastlm::moe_dispatch::cuda
