// How the backward scan is cut, and its launches in their order.
#include "core/cuda/launch.h"

#include "core/cuda/dispatch.h"
#include "ops/selective_scan/cuda/backward_launch.h"
#include "ops/selective_scan/cuda/backward_sums.cuh"

namespace fastlm::selective_scan::cuda {
namespace {

// Channels of a block: those whose sums of dB and dC are formed in shared memory.
int64_t block_channels(const BackwardCall& call, DType dtype) {
  return call.paired ? kPairedChannels : dtype == DType::kFloat64 ? 16 : 32;
}
int64_t num_blocks(const BackwardCall& call, DType dtype) {
  return call.p.groups * ceil_div(call.p.dim / call.p.groups, block_channels(call, dtype));
}

int64_t accumulation_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

bool plain(const Params& p) { return p.state <= kBackwardStates && !p.B.constant && !p.C.constant; }

// Two channels a lane take a quarter less time for a channel: worth it unless blocks of 64 stay emptier than those of 32 by more.
bool worth_pairing(const Params& p, DType dtype) {
  if (!plain(p) || (dtype != DType::kBFloat16 && dtype != DType::kFloat16)) return false;
  if (fastlm::cuda::current_device().max_shared_bytes < 2 * kPairedShared) return false;  // two blocks on a multiprocessor
  const int64_t channels = p.dim / p.groups;
  return ceil_div(channels, kPairedChannels) * kPairedChannels * 3 <= ceil_div(channels, 32) * 32 * 4;
}

}  // namespace

void plan_backward(BackwardCall& call, DType dtype) {
  constexpr int64_t kLeastPart = 256;
  const Params& p = call.p;
  call.paired = worth_pairing(p, dtype);
  // What a device with 132 multiprocessors holds. Enough teams that the last ones do not count for much; but a split sequence
  // costs a fifth more, and is worth that only where the device would be less than half full.
  const int64_t held = call.paired ? 264 : 396, wanted = 4 * held;
  const int64_t blocks = num_blocks(call, dtype), teams = blocks * p.num_sequences;
  call.split = {0, p.num_sequences, nullptr, nullptr, nullptr};
  if (p.state <= kBackwardStates && teams > 0 && teams <= held / 2 && p.seqlen >= 4 * kLeastPart) {
    const int64_t even = ceil_div(p.batch * p.seqlen * blocks, wanted);
    call.split.part = max_of(kLeastPart, ceil_div(even, kChunk) * kChunk);
    call.split.slots = p.device.cu_seqlens != nullptr ? p.seqlen / call.split.part + p.num_sequences
                                                      : p.batch * ceil_div(p.seqlen, call.split.part);
  }
  call.slices = min_of(call.split.slots, ceil_div(2 * wanted, blocks));
  call.parameters = parameter_rows(p);
  call.padded_state = ceil_div(p.state, kBackwardStates) * kBackwardStates;
}

int64_t position_sums_size(const BackwardCall& call, DType dtype) {
  if (call.p.B.constant && call.p.C.constant) return 0;
  return num_blocks(call, dtype) * call.p.batch * call.p.seqlen * 2 * call.padded_state;
}
int64_t parameter_sums_size(const BackwardCall& call) { return call.slices * call.parameters.count * call.p.dim; }
int64_t carried_size(const BackwardCall& call, DType dtype) {
  if (plain(call.p) && accumulation_size(dtype) == 4) return 0;
  return call.slices * num_blocks(call, dtype) * call.padded_state * 4 * block_channels(call, dtype);
}

cudaError_t launch_backward(BackwardCall call, const BackwardSums& sums, void* begin_states, DType dtype, cudaStream_t stream) {
  constexpr unsigned int kThreads = 256;
  const auto grid = [](int64_t items) { return dim3(fastlm::cuda::limited(ceil_div(items, kThreads), 0x7fffffff)); };
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() -> cudaError_t {
    using A = acc_t<T>;
    if (call.split.part != 0) {
      call.ends_only = true;
      if (const cudaError_t status = run_backward<T>(call, stream); status != cudaSuccess) return status;
      const int64_t items = call.p.num_sequences * call.p.state * call.p.dim;
      const cudaError_t status =
          fastlm::cuda::launch<carry_back_kernel<A>>(grid(items), kThreads, 0, stream, call, static_cast<A*>(begin_states));
      if (status != cudaSuccess) return status;
      call.split.begin_states = begin_states;
    }
    call.ends_only = false;
    if (const cudaError_t status = run_backward<T>(call, stream); status != cudaSuccess) return status;
    const int64_t quads = call.p.batch * call.p.seqlen * 2 * call.padded_state / 4;
    if (call.position_sums != nullptr && quads > 0) {
      const cudaError_t status =
          fastlm::cuda::launch<position_sums_kernel<T>>(grid(quads), kThreads, 0, stream, call, sums, num_blocks(call, dtype));
      if (status != cudaSuccess) return status;
    }
    return fastlm::cuda::launch<parameter_sums_kernel<A>>(grid(call.parameters.count * call.p.dim), kThreads, 0, stream, call,
                                                          sums);
  });
}

}  // namespace fastlm::selective_scan::cuda
