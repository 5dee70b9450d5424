// A barrier of all blocks of a cooperative launch (launch_cooperative): what any of them wrote before it, all of them see after
// it.
#pragma once

#include "core/cuda/device.cuh"

namespace fastlm::cuda {

// Lives in registers, one copy in every thread; `counter` is 0 before the launch and counts arrivals.
struct GridBarrier {
  int32_t* counter;
  int32_t arrived;  // when all blocks have passed the barriers so far

  // Called by all threads of the block, which are the team.
  template <class BlockTeam>
  __device__ __forceinline__ void wait(int blocks, const BlockTeam& team) {
    arrived += blocks;
    team.sync();
    if (team.thread == 0) {  // release and acquire by one thread, carried to and from the others by the block's barriers
      add_release(counter, 1);
      while (load_acquire(counter) < arrived) pause();
    }
    team.sync();
  }
};

}  // namespace fastlm::cuda
