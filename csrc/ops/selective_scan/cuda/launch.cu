// Which forward scan is launched, and how time is split.
#include "core/cuda/launch.h"

#include "core/cuda/dispatch.h"
#include "ops/selective_scan/cuda/carry.cuh"
#include "ops/selective_scan/cuda/launch.h"

namespace fastlm::selective_scan::cuda {

Split plan_split(const Params& p) {
  // Teams of 32 channels. A scan costs as long as its longest sequence however few there are; a split one reads and computes all
  // twice, so it must be able to run four parts at once: less than a quarter of what a device with 132 multiprocessors holds.
  constexpr int64_t kEnoughTeams = 66, kWantedTeams = 528, kLeastPart = 256;
  constexpr int64_t kSmallStates = 16, kTeamChannels = 32;
  const int64_t teams = p.groups * ceil_div(p.dim / p.groups, kTeamChannels) * p.num_sequences;
  const Split whole{0, p.num_sequences, nullptr, nullptr, nullptr};
  if (p.state > kSmallStates || teams == 0 || teams > kEnoughTeams || p.seqlen < 4 * kLeastPart) return whole;
  const int64_t part =
      max_of(kLeastPart, ceil_div(ceil_div(p.batch * p.seqlen * teams, p.num_sequences * kWantedTeams), kChunk) * kChunk);
  const bool packed = p.device.cu_seqlens != nullptr;
  const int64_t slots = packed ? p.seqlen / part + p.num_sequences : p.batch * ceil_div(p.seqlen, part);
  return {part, slots, nullptr, nullptr, nullptr};
}

cudaError_t launch_forward(ForwardCall call, void* begin_states, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() -> cudaError_t {
    using A = acc_t<T>;
    if (call.split.part != 0) {
      call.ends_only = true;
      call.split.begin_states = nullptr;
      if (const cudaError_t status = run_forward<T>(call, stream); status != cudaSuccess) return status;
      const int64_t items = call.p.num_sequences * call.p.state * call.p.dim;
      const cudaError_t status = fastlm::cuda::launch<carry_kernel<A>>(dim3(fastlm::cuda::limited(ceil_div(items, 256), 65535)),
                                                                       256, 0, stream, call, static_cast<A*>(begin_states));
      if (status != cudaSuccess) return status;
      call.split.begin_states = begin_states;
    }
    call.ends_only = false;
    return run_forward<T>(call, stream);
  });
}

}  // namespace fastlm::selective_scan::cuda
