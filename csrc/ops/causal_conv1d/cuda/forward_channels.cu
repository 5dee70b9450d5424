// Launches of forward_channels.cuh.
#include "core/cuda/dispatch.h"
#include "ops/causal_conv1d/cuda/forward_channels.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

template <class T, int kWidth>
cudaError_t start(const Params& p, cudaStream_t stream) {
  const bool vectors = lines_are_aligned(p, p.x, p.x_batch_stride, p.x_dim_stride, sizeof(T)) &&
                       lines_are_aligned(p, p.out, p.out_batch_stride, p.out_dim_stride, sizeof(T));
  const Tiling tiling = tile_channels(p, vectors);
  const int64_t blocks = tiling.tiles + state_blocks(p, tiling, kChannelThreads);
  if (blocks == 0) return cudaSuccess;
  return fastlm::cuda::launch<forward_channels<T, kWidth>>(dim3(static_cast<unsigned int>(blocks)), kChannelThreads, 0, stream, p,
                                                           tiling);
}

}  // namespace

cudaError_t launch_forward_channels(const Params& p, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      if (p.width == 2) return start<T, 2>(p, stream);
      if (p.width == 3) return start<T, 3>(p, stream);
      if (p.width == 4) return start<T, 4>(p, stream);
    }
    return cudaErrorInvalidValue;  // not asked for
  });
}

}  // namespace fastlm::causal_conv1d::cuda
