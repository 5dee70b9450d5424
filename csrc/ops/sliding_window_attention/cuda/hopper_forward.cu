// Which forward calls the sm_90a kernels take, and the choice among their instances.
#include <algorithm>

#include "core/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/hopper.h"
#include "ops/sliding_window_attention/cuda/hopper_forward.h"
#include "ops/sliding_window_attention/cuda/hopper_host.h"

namespace fastlm::sliding_window_attention::cuda {

#ifdef FASTLM_HOPPER_KERNELS

bool hopper_forward_applies(const Params& p, DType dtype) {
  return hopper_takes(p, dtype) && vector_rows(p.out) && has_tensor_map(rows_shape(p, p.q, p.num_heads, p.device.total_q, 64)) &&
         has_tensor_map(rows_shape(p, p.k, p.num_kv_heads, p.device.total_k, 64)) &&
         has_tensor_map(rows_shape(p, p.v, p.num_kv_heads, p.device.total_k, 64));
}

HopperForward make_hopper_forward(const Params& p, DType dtype, cudaError_t& status) {
  constexpr int kRows = 128;
  const int keys = p.head_dim > 128 ? 64 : 128;
  const int64_t span = std::min(p.left + p.right, p.device.total_k);
  HopperForward f{p, Scoring<float>(p), {}, {}, {}, tile_order(p, kRows, p.device.total_q, p.num_heads, span)};
  status = rows_map(f.q, dtype, p, p.q, p.num_heads, p.device.total_q, kRows);
  if (status == cudaSuccess) status = rows_map(f.k, dtype, p, p.k, p.num_kv_heads, p.device.total_k, keys);
  if (status == cudaSuccess) status = rows_map(f.v, dtype, p, p.v, p.num_kv_heads, p.device.total_k, keys);
  return f;
}

cudaError_t launch_hopper_forward(const Params& p, DType dtype, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  const HopperForward f = make_hopper_forward(p, dtype, status);
  if (status != cudaSuccess) return status;
  if (p.head_dim <= 64) return run_hopper_forward<64>(f, dtype, stream);
  if (p.head_dim <= 128) return run_hopper_forward<128>(f, dtype, stream);
  return run_hopper_forward<256>(f, dtype, stream);
}

#else

bool hopper_forward_applies(const Params&, DType) { return false; }
cudaError_t launch_hopper_forward(const Params&, DType, cudaStream_t) { return cudaErrorNotSupported; }

#endif

}  // namespace fastlm::sliding_window_attention::cuda
