// The parallel loop of the CPU twins: torch's own thread pool (torch.set_num_threads rules it).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace fastlm {

// Calls f(begin, end) over [0, items) from several threads, at least `grain` items each. f must not throw.
template <class F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  if (items <= 0) return;
  if (items <= grain) {
    f(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

}  // namespace fastlm
