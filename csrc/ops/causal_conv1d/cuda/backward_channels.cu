// Launches of backward_channels.cuh.
#include "core/cuda/dispatch.h"
#include "ops/causal_conv1d/cuda/backward_channels.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

template <class T, int kWidth>
cudaError_t start(const BackwardParams& p, cudaStream_t stream) {
  const bool vectors = lines_are_aligned(p, p.x, p.x_batch_stride, p.x_dim_stride, sizeof(T)) &&
                       lines_are_aligned(p, p.dout, p.dout_batch_stride, p.dout_dim_stride, sizeof(T)) &&
                       lines_are_aligned(p, p.dx, p.dx_batch_stride, p.dx_dim_stride, sizeof(T));
  const Tiling tiling = tile_channels(p, vectors);
  const int64_t blocks = tiling.tiles + (p.dinitial_states != nullptr ? state_blocks(p, tiling, kChannelThreads) : 0);
  if (blocks == 0) return cudaSuccess;
  return fastlm::cuda::launch<backward_channels<T, kWidth>>(dim3(static_cast<unsigned int>(blocks)), kChannelThreads,
                                                            (kWidth + 1) * kChannelThreads * sizeof(acc_t<T>), stream, p, tiling);
}

}  // namespace

cudaError_t launch_backward_channels(const BackwardParams& p, DType dtype, cudaStream_t stream) {
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
