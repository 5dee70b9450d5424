// Work in phases without barriers. A phase is a number of pieces that may run in any order and on any thread; it names the last
// earlier phase it needs, and begins when that one and all before it are finished. Free threads take the next piece, so they run
// into the phases ahead instead of waiting for the slowest: what matters on machines where a core is sometimes taken away.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "adapter/parallel.h"

namespace fastlm {

struct Phase {
  int64_t pieces;
  int64_t after;  // this phase and all before it must be finished; -1: nothing
};

namespace pipeline_detail {

struct Progress {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

}  // namespace pipeline_detail

// Calls run(phase, piece) for all pieces of the phases 0 .. count-1, phase_at(i) being a Phase with `after` < i. run must not
// throw; memory that its kernels did not get is reported as by parallel_for.
template <class PhaseAt, class Run>
void run_pipeline(const char* op, int64_t count, const PhaseAt& phase_at, const Run& run) {
  const auto progress = std::make_unique<pipeline_detail::Progress[]>(static_cast<size_t>(count));
  std::atomic<int64_t> finished{0};  // leading phases known to be finished
  const auto wait_for = [&](int64_t phase) {
    for (int spins = 0; finished.load(std::memory_order_acquire) <= phase;) {
      int64_t first = finished.load(std::memory_order_acquire);
      if (progress[first].done.load(std::memory_order_acquire) == phase_at(first).pieces) {
        finished.compare_exchange_weak(first, first + 1, std::memory_order_acq_rel);
      } else if (++spins > 64) {
        std::this_thread::yield();
      }
    }
  };
  parallel_for(op, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = 0; i < count; ++i) {
        const Phase phase = phase_at(i);
        bool ready = false;
        for (int64_t piece; (piece = progress[i].next.fetch_add(1, std::memory_order_relaxed)) < phase.pieces;) {
          if (!ready) wait_for(phase.after);
          ready = true;
          run(i, piece);
          progress[i].done.fetch_add(1, std::memory_order_release);
        }
      }
    }
  });
}

// The pieces of a single phase.
template <class Run>
void run_pieces(const char* op, int64_t pieces, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  parallel_for(op, pieces < threads ? pieces : threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) run(piece);
    }
  });
}

}  // namespace fastlm
