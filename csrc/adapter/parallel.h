// The parallel loop of the CPU twins: torch's own thread pool (torch.set_num_threads rules it).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
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

// The same for pieces of unequal size: every thread takes the next `grain` items as soon as it is free. Which thread runs an item
// is left to chance, so an item must own its outputs.
template <class F>
void parallel_for_dynamic(int64_t items, int64_t grain, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (items + grain - 1) / grain);
  if (threads <= 1) {
    if (items > 0) f(int64_t{0}, items);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(grain); i < items; i = next.fetch_add(grain)) f(i, std::min(i + grain, items));
  });
}

}  // namespace fastlm
