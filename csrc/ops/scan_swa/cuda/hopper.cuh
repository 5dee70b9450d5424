// A scan and an attention in one launch, on sm_90a: one block of four warpgroups for each multiprocessor. Three are those of the
// attention alone (tile copies, twice 64 queries on the tensor cores), the fourth scans: its exponentials and multiply-adds are
// what the tensor cores leave unused. The attention's consumers give up 32 of 232 registers for it, which costs
// them no spills; the scan takes its tight form, whose inner loop has none either.
#pragma once

#include "core/cuda/launch.h"
#include "ops/scan_swa/cuda/launch.h"
#include "ops/selective_scan/cuda/forward_launch.cuh"
#include "ops/sliding_window_attention/cuda/hopper_forward.cuh"
#include "ops/sliding_window_attention/cuda/hopper_forward.h"
#include "ops/sliding_window_attention/cuda/hopper_host.h"

namespace fastlm::scan_swa::cuda {

namespace scan = selective_scan::cuda;
namespace swa = sliding_window_attention::cuda;

constexpr int kTurnBarrier = 1, kScanBarrier = 4, kThreads = 512;
// 512 threads get 128 registers each at first: what is given here adds up to four times that.
constexpr int kCopyRegisters = 32, kAttentionRegisters = 200, kScanRegisters = 80;
static_assert(kCopyRegisters + 2 * kAttentionRegisters + kScanRegisters == 4 * 128);

template <class T>
using HopperScan = scan::ForwardShape<T, 4, 4, 32, scan::kForwardStages<T>, false>;

template <class T, int kD>
constexpr int kHopperBytes = (swa::ForwardShared<kD>::kBytes + 127) / 128 * 128 + HopperScan<T>::kSharedBytes;

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, 1) fused_hopper(const __grid_constant__ swa::HopperForward f,
                                                            const __grid_constant__ scan::ForwardCall call, int64_t scan_count) {
#if FASTLM_HOPPER_BODY
  static_assert(kHopperBytes<T, kD> <= 227 * 1024);
  char* memory = fastlm::cuda::shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(fastlm::cuda::kFullWarp, thread / 128, 0);
  if (thread == 0) {
    fastlm::cuda::prefetch_map(f.q);
    fastlm::cuda::prefetch_map(f.k);
    fastlm::cuda::prefetch_map(f.v);
    swa::ForwardShared<kD>(memory).open();
  }
  __syncthreads();
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  if (warpgroup == 0) {
    fastlm::cuda::give_registers<kCopyRegisters>();
    swa::forward_producer<T, kD>(f, memory, thread, block, blocks);
  } else if (warpgroup < 3) {
    fastlm::cuda::take_registers<kAttentionRegisters>();
    swa::forward_consumer<T, kD, kTurnBarrier>(f, memory, warpgroup - 1, thread % 128, block, blocks);
  } else {
    fastlm::cuda::give_registers<kScanRegisters>();
    const fastlm::cuda::Team<128> team{thread % 128, kScanBarrier};
    char* shared = memory + (swa::ForwardShared<kD>::kBytes + 127) / 128 * 128;
    for (int64_t item = block; item < scan_count; item += blocks) {
      scan::forward_tile<HopperScan<T>>(team, call, item, shared);
      team.sync();
    }
  }
#else
  __trap();
#endif
}

template <class T, int kD>
cudaError_t run_hopper(const scan::ForwardCall& call, const swa::HopperForward& f, cudaStream_t stream) {
  const int64_t scan_count = call.split.slots * HopperScan<T>::blocks(call.p);
  const int64_t blocks = min_of(max_of(scan_count, f.order.count), fastlm::cuda::current_device().num_sms);
  return fastlm::cuda::launch<fused_hopper<T, kD>>(dim3(static_cast<unsigned int>(blocks)), kThreads, kHopperBytes<T, kD>, stream,
                                                   f, call, scan_count);
}

template <class T>
cudaError_t launch_hopper(const scan::ForwardCall& call, const sliding_window_attention::Params& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  const swa::HopperForward f = swa::make_hopper_forward(p, DTypeOf<T>::value, status);
  if (status != cudaSuccess) return status;
  if (p.head_dim <= 64) return run_hopper<T, 64>(call, f, stream);
  if (p.head_dim <= kMostHopperHead) return run_hopper<T, kMostHopperHead>(call, f, stream);
  return cudaErrorNotSupported;  // sums of heads of 256 take more registers than 512 threads have: not fused
}

}  // namespace fastlm::scan_swa::cuda
