// The parallel loop of the CPU twins: torch's own thread pool (torch.set_num_threads rules it).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/integers.h"
#include "core/scratch.h"

namespace fastlm {

// Calls f(begin, end) over [0, items) from several threads, at least `grain` items each. f must not throw: in a parallel region
// an exception would lose its type. A kernel that gets no scratch memory returns, and std::runtime_error is thrown in the name of
// `op` when all threads are done.
template <class F>
void parallel_for(const char* op, int64_t items, int64_t grain, const F& f) {
  std::atomic<size_t> missing{0};  // bytes
  const auto run = [&](int64_t begin, int64_t end) {
    f(begin, end);
    if (const size_t bytes = take_scratch_failure(); bytes != 0) missing.store(bytes, std::memory_order_relaxed);
  };
  if (items <= 0) return;
  if (items <= grain) {
    run(0, items);
  } else {
    torch::stable::parallel_for(0, items, grain, run);
  }
  if (missing != 0) {
    throw std::runtime_error(std::string(op) + ": out of memory: could not allocate " + std::to_string(missing) +
                             " bytes of working memory for a thread");
  }
}

// The same for pieces of unequal size: every thread takes the next `grain` items as soon as it is free. Which thread runs an item
// is left to chance, so an item must own its outputs.
template <class F>
void parallel_for_dynamic(const char* op, int64_t items, int64_t grain, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (items + grain - 1) / grain);
  if (threads <= 1) return parallel_for(op, items, items, f);
  std::atomic<int64_t> next{0};
  parallel_for(op, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(grain); i < items; i = next.fetch_add(grain)) f(i, std::min(i + grain, items));
  });
}

// One of several loops that need nothing of each other.
struct Loop {
  int64_t items, work;  // work of one item, in any unit
  std::function<void(int64_t begin, int64_t end)> run;
};

// All of them in one parallel region: to begin one costs several microseconds. `grain`: work worth another thread.
inline void parallel_loops(const char* op, const std::vector<Loop>& loops, int64_t grain) {
  int64_t total = 0;
  for (const Loop& loop : loops) total += loop.items * loop.work;
  parallel_for(op, total, grain, [&](int64_t begin, int64_t end) {
    int64_t before = 0;
    for (const Loop& loop : loops) {
      const int64_t here = loop.items * loop.work;
      const auto item_at = [&](int64_t work) { return ceil_div(std::clamp<int64_t>(work - before, 0, here), loop.work); };
      if (item_at(begin) < item_at(end)) loop.run(item_at(begin), item_at(end));
      before += here;
    }
  });
}

}  // namespace fastlm
