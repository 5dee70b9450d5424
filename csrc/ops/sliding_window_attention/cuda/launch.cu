// Which kernels a call of sliding_window_attention takes, and the launch of delta.cuh.
#include "ops/sliding_window_attention/cuda/launch.h"

#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/delta.cuh"
#include "ops/sliding_window_attention/cuda/hopper.h"

namespace fastlm::sliding_window_attention::cuda {

// Defined by the files of instances.
template <class T>
cudaError_t launch_forward_dims(const Params& p, cudaStream_t stream);
template <class T>
cudaError_t launch_backward_dims(const BackwardParams& p, cudaStream_t stream);
template <class T, int kDim>
cudaError_t launch_generic(const BackwardParams& p, bool backward, cudaStream_t stream);

namespace {

constexpr int64_t kMatrixHeadDim = 256;

bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

template <class Rows>
bool vector_rows(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.ptr) % 16 == 0 && rows.batch_stride % 8 == 0 && rows.seq_stride % 8 == 0 &&
         rows.head_stride % 8 == 0;
}

cudaError_t generic_pass(const BackwardParams& p, bool backward, DType dtype, cudaStream_t stream) {
  const bool small = p.head_dim <= 128;
  switch (dtype) {
    case DType::kFloat32:
      return small ? launch_generic<float, 128>(p, backward, stream) : launch_generic<float, 512>(p, backward, stream);
    case DType::kFloat64:
      return small ? launch_generic<double, 128>(p, backward, stream) : launch_generic<double, 512>(p, backward, stream);
    case DType::kBFloat16:
      return launch_generic<bfloat16, 512>(p, backward, stream);
    default:
      return launch_generic<float16, 512>(p, backward, stream);
  }
}

}  // namespace

bool vectors_apply(const Params& p, DType dtype) {
  return is_16_bit(dtype) && p.head_dim % 8 == 0 && vector_rows(p.q) && vector_rows(p.k) && vector_rows(p.v) &&
         vector_rows(p.out);
}

bool vectors_apply(const BackwardParams& p, DType dtype) {
  return vectors_apply(static_cast<const Params&>(p), dtype) && vector_rows(p.dout) && vector_rows(p.dq) && vector_rows(p.dk) &&
         vector_rows(p.dv);
}

cudaError_t launch_forward_mma(const Params& p, DType dtype, cudaStream_t stream) {
  return dtype == DType::kBFloat16 ? launch_forward_dims<bfloat16>(p, stream) : launch_forward_dims<float16>(p, stream);
}

cudaError_t launch_forward_generic(const Params& p, DType dtype, cudaStream_t stream) {
  BackwardParams all{};
  static_cast<Params&>(all) = p;
  return generic_pass(all, false, dtype, stream);
}

cudaError_t launch_forward(const Params& p, DType dtype, cudaStream_t stream) {
  if (hopper_forward_applies(p, dtype)) return launch_hopper_forward(p, dtype, stream);
  if (is_16_bit(dtype) && p.head_dim <= kMatrixHeadDim) return launch_forward_mma(p, dtype, stream);
  return launch_forward_generic(p, dtype, stream);
}

cudaError_t launch_row_delta(const BackwardParams& p, DType dtype, cudaStream_t stream) {
  const int64_t batch = p.device.cu_q != nullptr ? 1 : p.device.num_sequences;
  const int64_t rows = batch * p.device.total_q * p.num_heads;
  if (rows == 0) return cudaSuccess;
  constexpr int64_t kRows = kDeltaThreads / kDeltaLanes;
  const dim3 grid(fastlm::cuda::limited((rows + kRows - 1) / kRows, 1 << 20));
  const bool vectors = vectors_apply(p, dtype);
  return fastlm::cuda::visit_dtype(
      dtype, [&]<class T>() { return fastlm::cuda::launch<row_delta<T>>(grid, kDeltaThreads, 0, stream, p, rows, vectors); });
}

cudaError_t launch_backward_mma(const BackwardParams& p, DType dtype, cudaStream_t stream) {
  return dtype == DType::kBFloat16 ? launch_backward_dims<bfloat16>(p, stream) : launch_backward_dims<float16>(p, stream);
}

cudaError_t launch_backward_generic(const BackwardParams& p, DType dtype, cudaStream_t stream) {
  return generic_pass(p, true, dtype, stream);
}

size_t backward_workspace_bytes(const BackwardParams& p, DType dtype) {
  return hopper_backward_applies(p, dtype) ? hopper_backward_workspace_bytes(p) : 0;
}

cudaError_t launch_backward(const BackwardParams& p, void* workspace, DType dtype, cudaStream_t stream) {
  if (const cudaError_t status = launch_row_delta(p, dtype, stream); status != cudaSuccess) return status;
  if (hopper_backward_applies(p, dtype)) return launch_hopper_backward(p, workspace, dtype, stream);
  if (is_16_bit(dtype) && p.head_dim <= kMatrixHeadDim) return launch_backward_mma(p, dtype, stream);
  return launch_backward_generic(p, dtype, stream);
}

}  // namespace fastlm::sliding_window_attention::cuda
