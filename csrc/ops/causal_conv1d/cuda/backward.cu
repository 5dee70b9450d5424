// Launches of backward.cuh.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/causal_conv1d/cuda/backward.cuh"
#include "ops/causal_conv1d/cuda/launch.h"

namespace fastlm::causal_conv1d::cuda {
namespace {

using fastlm::cuda::limited;

int64_t pieces_per_row(const Params& p, bool channel_last) {
  const int64_t piece = channel_last ? kStepsRows : kThreads * kStepsChannels;
  return (p.seqlen + piece - 1) / piece;
}

template <class T, int kWidth>
void launch(const BackwardParams& p, bool channel_last, cudaStream_t stream) {
  const int64_t pieces = pieces_per_row(p, channel_last);
  if (channel_last) {
    const dim3 grid(static_cast<unsigned int>((p.dim + kThreads - 1) / kThreads), limited(pieces, 65535),
                    limited(p.batch, 65535));
    fastlm::cuda::launch<backward_rows<T, kWidth>>(grid, kThreads, 0, stream, p, pieces);
  } else {
    const dim3 grid(static_cast<unsigned int>(pieces), limited(p.dim, 65535), limited(p.batch, 65535));
    fastlm::cuda::launch<backward_channels<T, kWidth>>(grid, kThreads, kThreads * sizeof(acc_t<T>), stream, p, pieces);
  }
}

}  // namespace

int64_t num_partials(const Params& p, bool channel_last) { return p.batch * pieces_per_row(p, channel_last); }

cudaError_t launch_backward(const BackwardParams& p, DType dtype, bool channel_last, int64_t num_states, void* dweight,
                            void* dbias, cudaStream_t stream) {
  fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    using A = acc_t<T>;
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
    const int64_t columns = (p.width + 1) * p.dim;
    if (columns > 0) {
      fastlm::cuda::launch<reduce_partial<A>>(dim3(limited((columns + 127) / 128, 65535)), 128, 0, stream,
                                              static_cast<const A*>(p.partial), num_partials(p, channel_last), p.dim, p.width,
                                              static_cast<A*>(dweight), static_cast<A*>(dbias));
    }
    const int64_t state_items = num_states * p.dim * (p.width - 1);
    if (p.dinitial_states != nullptr && state_items > 0) {
      fastlm::cuda::launch<initial_state_grad<T>>(dim3(limited((state_items + 255) / 256, 4096)), 256, 0, stream, p, num_states);
    }
  });
  return cudaGetLastError();
}

}  // namespace fastlm::causal_conv1d::cuda
