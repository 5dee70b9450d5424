// Launches of backward.cuh, and for widths and dtypes without an instance of their own.
#include "core/cuda/dispatch.h"
#include "ops/causal_conv1d/cuda/backward.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

bool has_instance(const BackwardParams& p, DType dtype) { return p.width >= 2 && p.width <= 4 && dtype != DType::kFloat64; }

bool along_time(const BackwardParams& p, DType dtype) {
  return has_instance(p, dtype) && p.x_seq_stride == 1 && p.dout_seq_stride == 1 && p.dx_seq_stride == 1 && p.x_dim_stride != 1;
}

// Positions of a warp: long enough that partial sums stay small beside the activations, short enough for 132 x 640 threads.
Tiling tile(const BackwardParams& p, DType dtype, int64_t lanes) {
  const int64_t warps = backward_threads(has_instance(p, dtype) ? 4 : 0) / 32;
  int64_t steps = 64;
  while (steps > 16 && p.batch * ceil_div(p.seqlen, steps) * ceil_div(p.dim, 4) < 132 * 640) steps /= 2;
  const int64_t share = ceil_div(ceil_div(p.seqlen, warps), kUnroll) * kUnroll;
  if (share < steps) steps = share > kUnroll ? share : kUnroll;
  return tile_rows(p, steps, warps, 32 * lanes);
}

template <class T, int kWidth, int kLanes>
cudaError_t start(const BackwardParams& p, cudaStream_t stream) {
  constexpr int kThreads = backward_threads(kWidth);
  const Tiling tiling = tile(p, DTypeOf<T>::value, kLanes);
  const int64_t blocks = tiling.tiles + (p.dinitial_states != nullptr ? state_blocks(p, tiling, kThreads) : 0);
  if (blocks == 0) return cudaSuccess;
  const int64_t rows = kWidth > 0 ? (kWidth + 1) * kLanes : 4 * p.width + 1;
  return fastlm::cuda::launch<backward_rows<T, kWidth, kLanes>>(dim3(static_cast<unsigned int>(blocks)), kThreads,
                                                                rows * kThreads * sizeof(acc_t<T>), stream, p, tiling);
}

template <class T, int kWidth>
cudaError_t start_width(const BackwardParams& p, cudaStream_t stream) {
  constexpr int kLanes = 4;  // 8 channels of 16 bits would need some 200 registers: 8 warps instead of 16
  const bool aligned = rows_are_aligned(p, sizeof(T), kLanes) && p.dout_dim_stride == 1 && p.dx_dim_stride == 1 &&
                       multiple_of_16_bytes(p.dout) && multiple_of_16_bytes(p.dx) &&
                       rows_are_aligned(p, p.dout_batch_stride, p.dout_seq_stride, sizeof(T)) &&
                       rows_are_aligned(p, p.dx_batch_stride, p.dx_seq_stride, sizeof(T));
  return aligned ? start<T, kWidth, kLanes>(p, stream) : start<T, kWidth, 1>(p, stream);
}

}  // namespace

int64_t num_partials(const BackwardParams& p, DType dtype) {
  if (p.seqlen == 0) return 0;
  return p.batch * (along_time(p, dtype) ? tile_channels(p, false) : tile(p, dtype, 1)).pieces;
}

cudaError_t launch_backward(const BackwardParams& p, DType dtype, void* dweight, void* dbias, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (along_time(p, dtype)) {
    status = launch_backward_channels(p, dtype, stream);
  } else {
    status = fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
      if constexpr (sizeof(T) < 8) {
        if (p.width == 2) return start_width<T, 2>(p, stream);
        if (p.width == 3) return start_width<T, 3>(p, stream);
        if (p.width == 4) return start_width<T, 4>(p, stream);
      }
      return start<T, 0, 1>(p, stream);
    });
  }
  if (status != cudaSuccess || p.dim == 0) return status;
  const dim3 grid(static_cast<unsigned int>(ceil_div((p.width + 1) * p.dim, kReduceColumns)));
  constexpr unsigned int kThreads = kReduceColumns * kReduceGroups;
  const int64_t pieces = num_partials(p, dtype);
  if (dtype == DType::kFloat64) {
    return fastlm::cuda::launch<reduce_partial<double>>(grid, kThreads, kThreads * sizeof(double), stream, p, pieces, dweight,
                                                        dbias);
  }
  return fastlm::cuda::launch<reduce_partial<float>>(grid, kThreads, kThreads * sizeof(float), stream, p, pieces, dweight, dbias);
}

}  // namespace fastlm::causal_conv1d::cuda
