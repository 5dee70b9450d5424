// Times the loops of kernels.h. Threads start together, each reads its own CPU clock; memory loops walk buffers that are larger
// than any last-level cache share and that each thread touched first.
#include "ceilings/measure.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "ceilings/kernels.h"

namespace fastlm::ceilings {
namespace {

constexpr int64_t kRounds = 20000;             // a fraction of a millisecond between two looks at the clock
constexpr int64_t kFloats = int64_t{1} << 24;  // 64 MiB per buffer

double seconds_of(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer touched_buffer() {
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, kFloats * sizeof(float))));
  if (!buffer) throw std::bad_alloc();
  std::fill_n(buffer.get(), kFloats, 1.0f);
  return buffer;
}

RegisterLoop register_loop(const Kernels& kernels, const std::string& name) {
  if (name == "fma") return kernels.fma;
  if (name == "exp2") return kernels.exp2;
  if (name == "dot_bf16") return kernels.dot_bf16;
  return nullptr;
}

struct Worker {
  double operations = 0, cpu_seconds = 0, end = 0;
  float sink = 0;
  Buffer from, to;
};

}  // namespace

std::vector<std::string> names() {
  std::vector<std::string> found{"fma", "exp2", "read", "copy"};
  if (FASTLM_CPU_KERNELS(ceiling_kernels).dot_bf16 != nullptr) found.emplace_back("dot_bf16");
  return found;
}

Rate measure(const std::string& name, double seconds, int threads) {
  const Kernels& kernels = FASTLM_CPU_KERNELS(ceiling_kernels);
  const RegisterLoop loop = register_loop(kernels, name);
  const bool is_read = name == "read", is_copy = name == "copy";
  if (loop == nullptr && !is_read && !is_copy) {
    throw std::invalid_argument("measure_ceiling: name must be one that the CPU level " +
                                std::string(cpu_level_name(cpu_level())) + " has, got '" + name + "'");
  }
  if (!(seconds > 0) || seconds > 60) {
    throw std::invalid_argument("measure_ceiling: seconds must be in (0, 60], got " + std::to_string(seconds));
  }
  if (threads < 1 || threads > 4096) {
    throw std::invalid_argument("measure_ceiling: threads must be in 1 .. 4096, got " + std::to_string(threads));
  }

  std::vector<Worker> workers(static_cast<size_t>(threads));
  std::atomic<int> ready{0};
  std::atomic<bool> failed{false};
  std::atomic<double> start{0};
  const auto run = [&](Worker& w) {
    try {
      if (is_read || is_copy) w.from = touched_buffer();
      if (is_copy) w.to = touched_buffer();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    if (ready.fetch_add(1) + 1 == threads) start = seconds_of(CLOCK_MONOTONIC);
    while (start.load() == 0) std::this_thread::yield();
    if (failed) return;
    const double stop = start.load() + seconds;
    const double cpu = seconds_of(CLOCK_THREAD_CPUTIME_ID);
    do {
      if (is_read) {
        w.operations += kernels.read(w.from.get(), kFloats, &w.sink);
      } else if (is_copy) {
        w.operations += kernels.copy(w.to.get(), w.from.get(), kFloats);
      } else {
        w.operations += loop(kRounds, &w.sink);
      }
      w.end = seconds_of(CLOCK_MONOTONIC);
    } while (w.end < stop);
    w.cpu_seconds = seconds_of(CLOCK_THREAD_CPUTIME_ID) - cpu;
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers.size(); ++i) others.emplace_back(run, std::ref(workers[i]));
  run(workers[0]);
  for (auto& thread : others) thread.join();
  if (failed) throw std::bad_alloc();

  double total = 0, end = 0, per_cpu = 0;
  for (const Worker& w : workers) {
    total += w.operations;
    per_cpu += w.operations / w.cpu_seconds;
    end = std::max(end, w.end);
  }
  return {per_cpu, total / (end - start)};
}

}  // namespace fastlm::ceilings
