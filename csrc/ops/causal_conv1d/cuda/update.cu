// Launches of update.cuh.
#include "core/cuda/dispatch.h"
#include "ops/causal_conv1d/cuda/launch.h"
#include "ops/causal_conv1d/cuda/tiling.h"
#include "ops/causal_conv1d/cuda/update.cuh"

namespace fastlm::causal_conv1d::cuda {
namespace {

template <auto kKernel>
cudaError_t start(const UpdateParams& p, int64_t lanes, size_t shared, cudaStream_t stream) {
  const auto blocks_per_row = static_cast<uint32_t>(ceil_div(p.dim, kUpdateThreads * lanes));
  return fastlm::cuda::launch<kKernel>(dim3(static_cast<unsigned int>(p.batch * blocks_per_row)), kUpdateThreads, shared, stream,
                                       p, blocks_per_row);
}

// Whether update_one_token can move the states of four channels, and their inputs and outputs, at once.
bool one_token_of_dense_states(const UpdateParams& p, int64_t size) {
  return p.num_tokens == 1 && p.device.cache_seqlens == nullptr && p.width == 4 && p.state_len_stride == 1 &&
         p.state_dim_stride == p.state_len && p.dim % 4 == 0 && p.x_dim_stride == 1 && p.out_dim_stride == 1 &&
         multiple_of_16_bytes(p.conv_state) && multiple_of_16_bytes(p.x) && multiple_of_16_bytes(p.out) &&
         multiple_of_16_bytes(p.state_batch_stride, size) && multiple_of_16_bytes(p.x_batch_stride, size) &&
         multiple_of_16_bytes(p.out_batch_stride, size) && weights_are_aligned(p);
}

}  // namespace

cudaError_t launch_update(const UpdateParams& p, DType dtype, cudaStream_t stream) {
  if (p.batch == 0 || p.dim == 0 || p.num_tokens == 0) return cudaSuccess;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      if (p.state_len == 3 && one_token_of_dense_states(p, sizeof(T))) return start<update_one_token<T, 3>>(p, 4, 0, stream);
      if (p.state_len == 4 && one_token_of_dense_states(p, sizeof(T))) return start<update_one_token<T, 4>>(p, 4, 0, stream);
    }
    return start<update_tokens<T>>(p, 1, 2 * p.width * kUpdateThreads * sizeof(acc_t<T>), stream);
  });
}

}  // namespace fastlm::causal_conv1d::cuda
