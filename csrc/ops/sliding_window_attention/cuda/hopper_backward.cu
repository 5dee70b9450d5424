// Which backward calls the sm_90a kernels take, their workspace, and the choice among their instances.
#include <limits>

#include "ops/sliding_window_attention/cuda/hopper.h"
#include "ops/sliding_window_attention/cuda/hopper_host.h"

namespace fastlm::sliding_window_attention::cuda {

#ifdef FASTLM_HOPPER_KERNELS

// Instances: hopper_backward_<kD>.cu.
template <int kD>
cudaError_t run_hopper_backward(const HopperBackward& f, DType dtype, cudaStream_t stream);

namespace {

constexpr int kKeys = 128;
constexpr int64_t kSumBytes = 8192 * 4, kAlign = 256;

int queries_of_step(const Params& p) { return p.head_dim <= 64 ? 128 : 64; }

TileOrder query_order(const BackwardParams& p) {
  return tile_order(p, queries_of_step(p), p.device.total_q, p.num_heads, p.device.total_k);
}
TileOrder key_order(const BackwardParams& p) {
  return tile_order(p, kKeys, p.device.total_k, p.num_kv_heads, std::min(p.left + p.right, p.device.total_q));
}
int64_t sums_bytes(const TileOrder& queries) { return queries.count * kSumBytes; }
int64_t counters_bytes(const TileOrder& queries) { return ((queries.count + 2) * 4 + kAlign - 1) / kAlign * kAlign; }

}  // namespace

bool hopper_backward_applies(const BackwardParams& p, DType dtype) {
  const int64_t limit = std::numeric_limits<int32_t>::max();
  return hopper_takes(p, dtype) && p.head_dim <= 128 && vector_rows(p.dq) && vector_rows(p.dk) && vector_rows(p.dv) &&
         has_tensor_map(rows_shape(p, p.q, p.num_heads, p.device.total_q, 64)) &&
         has_tensor_map(rows_shape(p, p.dout, p.num_heads, p.device.total_q, 64)) &&
         has_tensor_map(rows_shape(p, p.k, p.num_kv_heads, p.device.total_k, 64)) &&
         has_tensor_map(rows_shape(p, p.v, p.num_kv_heads, p.device.total_k, 64)) && query_order(p).count < limit &&
         key_order(p).count < limit;
}

size_t hopper_backward_workspace_bytes(const BackwardParams& p) {
  const TileOrder queries = query_order(p);
  return static_cast<size_t>(sums_bytes(queries) + counters_bytes(queries));
}

cudaError_t launch_hopper_backward(const BackwardParams& p, void* workspace, DType dtype, cudaStream_t stream) {
  const TileOrder queries = query_order(p);
  auto* turns = reinterpret_cast<int*>(static_cast<char*>(workspace) + sums_bytes(queries));
  int* ticket = turns + queries.count;
  HopperBackward f{p,      Scoring<float>(p), {}, {}, {}, {}, key_order(p), queries, static_cast<float*>(workspace), turns,
                   ticket, ticket + 1};
  const int rows = queries_of_step(p);
  cudaError_t status = rows_map(f.q, dtype, p, p.q, p.num_heads, p.device.total_q, rows);
  if (status == cudaSuccess) status = rows_map(f.dout, dtype, p, p.dout, p.num_heads, p.device.total_q, rows);
  if (status == cudaSuccess) status = rows_map(f.k, dtype, p, p.k, p.num_kv_heads, p.device.total_k, kKeys);
  if (status == cudaSuccess) status = rows_map(f.v, dtype, p, p.v, p.num_kv_heads, p.device.total_k, kKeys);
  if (status != cudaSuccess) return status;
  if (p.head_dim <= 64) return run_hopper_backward<64>(f, dtype, stream);
  return run_hopper_backward<128>(f, dtype, stream);
}

#else

bool hopper_backward_applies(const BackwardParams&, DType) { return false; }
size_t hopper_backward_workspace_bytes(const BackwardParams&) { return 0; }
cudaError_t launch_hopper_backward(const BackwardParams&, void*, DType, cudaStream_t) { return cudaErrorNotSupported; }

#endif

}  // namespace fastlm::sliding_window_attention::cuda
