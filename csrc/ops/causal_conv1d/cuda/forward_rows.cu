// Launches of forward.cuh along channels (channel-last memory), and for widths without an instance of their own.
#include "core/cuda/dispatch.h"
#include "ops/causal_conv1d/cuda/forward.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

// Positions of a thread: as many as leave the device enough threads, since each piece reads W-1 inputs again.
int64_t steps_of(const Params& p, int64_t lanes) {
  const int64_t wanted = static_cast<int64_t>(fastlm::cuda::current_device().num_sms) * 1024;
  for (int64_t steps = 32; steps > 8; steps /= 2) {
    if (p.batch * ceil_div(p.seqlen, steps) * ceil_div(p.dim, lanes) >= wanted) return steps;
  }
  return 8;
}

template <class T, int kWidth, int kLanes>
cudaError_t start(const Params& p, cudaStream_t stream) {
  const Tiling tiling = tile_rows(p, steps_of(p, kLanes), 1, kRowThreads * kLanes);
  const int64_t blocks = tiling.tiles + state_blocks(p, tiling, kRowThreads);
  if (blocks == 0) return cudaSuccess;
  const size_t shared = kWidth > 0 ? 0 : 2 * p.width * kRowThreads * sizeof(acc_t<T>);
  return fastlm::cuda::launch<forward_rows<T, kWidth, kLanes>>(dim3(static_cast<unsigned int>(blocks)), kRowThreads, shared,
                                                               stream, p, tiling);
}

template <class T, int kWidth>
cudaError_t start_width(const Params& p, cudaStream_t stream) {
  constexpr int kLanes = 16 / sizeof(T);
  const bool aligned = rows_are_aligned(p, sizeof(T), kLanes) && p.out_dim_stride == 1 && multiple_of_16_bytes(p.out) &&
                       rows_are_aligned(p, p.out_batch_stride, p.out_seq_stride, sizeof(T));
  return aligned ? start<T, kWidth, kLanes>(p, stream) : start<T, kWidth, 1>(p, stream);
}

}  // namespace

cudaError_t launch_forward(const Params& p, DType dtype, cudaStream_t stream) {
  const bool fast_width = p.width >= 2 && p.width <= 4 && dtype != DType::kFloat64;
  if (fast_width && p.x_seq_stride == 1 && p.out_seq_stride == 1 && p.x_dim_stride != 1) {
    return launch_forward_channels(p, dtype, stream);
  }
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      if (p.width == 2) return start_width<T, 2>(p, stream);
      if (p.width == 3) return start_width<T, 3>(p, stream);
      if (p.width == 4) return start_width<T, 4>(p, stream);
    }
    return start<T, 0, 1>(p, stream);
  });
}

}  // namespace fastlm::causal_conv1d::cuda
