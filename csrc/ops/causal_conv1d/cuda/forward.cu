// Launches of forward.cuh.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/causal_conv1d/cuda/forward.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

using fastlm::cuda::limited;

template <class T, int kWidth>
void launch(const Params& p, bool channel_last, cudaStream_t stream) {
  if (channel_last) {
    const dim3 grid(static_cast<unsigned int>((p.dim + kThreads - 1) / kThreads),
                    limited((p.seqlen + kStepsRows - 1) / kStepsRows, 65535), limited(p.batch, 65535));
    fastlm::cuda::launch<forward_rows<T, kWidth>>(grid, kThreads, 0, stream, p);
  } else {
    const int64_t piece = kThreads * kStepsChannels;
    const dim3 grid(static_cast<unsigned int>((p.seqlen + piece - 1) / piece), limited(p.dim, 65535), limited(p.batch, 65535));
    fastlm::cuda::launch<forward_channels<T, kWidth>>(grid, kThreads, 0, stream, p);
  }
}

}  // namespace

cudaError_t launch_forward(const Params& p, DType dtype, bool channel_last, cudaStream_t stream) {
  const int64_t states = p.device.cu_seqlens != nullptr ? p.device.num_sequences : p.batch;
  const int64_t state_items = states * p.dim * (p.width - 1);
  fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    if (p.batch > 0 && p.dim > 0 && p.seqlen > 0) {
      switch (p.width) {
        case 2:
          launch<T, 2>(p, channel_last, stream);
          break;
        case 3:
          launch<T, 3>(p, channel_last, stream);
          break;
        case 4:
          launch<T, 4>(p, channel_last, stream);
          break;
        default:
          launch<T, 0>(p, channel_last, stream);
      }
    }
    if (state_items > 0)
      fastlm::cuda::launch<final_states<T>>(dim3(limited((state_items + 255) / 256, 4096)), 256, 0, stream, p, states);
  });
  return cudaGetLastError();
}

}  // namespace fastlm::causal_conv1d::cuda
