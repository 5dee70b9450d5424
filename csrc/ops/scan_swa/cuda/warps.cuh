// A scan and an attention in one launch, for every device: a block holds a team of four warps for either, so that on each
// multiprocessor the scan's exponentials and multiply-adds run beside the attention's matrix units. As many blocks as fit; each
// team takes the tiles of its own operator one after the other.
#pragma once

#include "core/cuda/launch.h"
#include "ops/scan_swa/cuda/launch.h"
#include "ops/selective_scan/cuda/forward_launch.cuh"
#include "ops/sliding_window_attention/cuda/forward.cuh"
#include "ops/sliding_window_attention/cuda/launch.h"

namespace fastlm::scan_swa::cuda {

namespace scan = selective_scan::cuda;
namespace swa = sliding_window_attention::cuda;
using fastlm::cuda::Team;

constexpr int kAttentionBarrier = 1, kScanBarrier = 2, kTeamThreads = 128;

// The scan's tiles a block takes, one after the other. `shared` is the team's own.
template <class Shape>
__device__ __forceinline__ void scan_items(const Team<128>& team, const scan::ForwardCall& call, int64_t items, int64_t block,
                                           int64_t blocks, char* shared) {
  for (int64_t item = block; item < items; item += blocks) {
    scan::forward_tile<Shape>(team, call, item, shared);
    team.sync();
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(2 * kTeamThreads, 1)
    fused_warps(const __grid_constant__ scan::ForwardCall call, int64_t scan_count,
                const __grid_constant__ sliding_window_attention::Params p, const __grid_constant__ swa::TileOptions options,
                int64_t attention_count) {
  char* shared = fastlm::cuda::shared_memory();
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x < kTeamThreads) {
    const Team<128> team{static_cast<int>(threadIdx.x), kAttentionBarrier};
    for (int64_t item = block; item < attention_count; item += blocks) {
      swa::forward_tile<T, kHeadDim>(team, p, options, item, shared);
      team.sync();
    }
  } else {
    const Team<128> team{static_cast<int>(threadIdx.x) - kTeamThreads, kScanBarrier};
    scan_items<scan::ForwardSmall<T>>(team, call, scan_count, block, blocks, shared + swa::ForwardShape<kHeadDim>::kSharedBytes);
  }
}

template <class T, int kHeadDim>
constexpr int kWarpsBytes = swa::ForwardShape<kHeadDim>::kSharedBytes + scan::ForwardSmall<T>::kSharedBytes;

template <class T, int kHeadDim>
cudaError_t run_warps(const scan::ForwardCall& call, const sliding_window_attention::Params& p, cudaStream_t stream) {
  using Scan = scan::ForwardSmall<T>;
  using Attention = swa::ForwardShape<kHeadDim>;
  constexpr int kSharedBytes = kWarpsBytes<T, kHeadDim>;
  const swa::TileOptions options{swa::Scoring<float>(p), swa::vectors_apply(p, DTypeOf<T>::value)};
  const int64_t scan_count = call.split.slots * Scan::blocks(call.p), attention_count = Attention::items(p);
  constexpr unsigned int kThreads = 2 * kTeamThreads;
  const int64_t fitting = max_of(1, fastlm::cuda::blocks_per_sm<fused_warps<T, kHeadDim>>(kThreads, kSharedBytes));
  const int64_t blocks = min_of(max_of(scan_count, attention_count), fitting * fastlm::cuda::current_device().num_sms);
  return fastlm::cuda::launch<fused_warps<T, kHeadDim>>(dim3(static_cast<unsigned int>(blocks)), kThreads, kSharedBytes, stream,
                                                        call, scan_count, p, options, attention_count);
}

template <class T>
int warps_shared_bytes(int64_t head_dim) {
  return head_dim <= 64 ? kWarpsBytes<T, 64> : head_dim <= 128 ? kWarpsBytes<T, 128> : kWarpsBytes<T, 256>;
}

template <class T>
cudaError_t launch_warps(const scan::ForwardCall& call, const sliding_window_attention::Params& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return run_warps<T, 64>(call, p, stream);
  if (p.head_dim <= 128) return run_warps<T, 128>(call, p, stream);
  return run_warps<T, 256>(call, p, stream);
}

}  // namespace fastlm::scan_swa::cuda
