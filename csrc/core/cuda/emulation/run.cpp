// Fibers, barriers and exchanges of the emulated device.
#include "core/cuda/emulation/run.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "core/cuda/emulation/fiber.h"
#include "core/cuda/launch.h"

namespace fastlm::cuda::emulation {

thread_local Position position;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kBarriers = 16;

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoll(text, nullptr, 10) : otherwise;
}

struct Meeting {  // of lanes in an exchange
  Combine combine = nullptr;
  uint32_t mask = 0;
  std::vector<void*> payloads;
  unsigned int arrived = 0;
  uint64_t round = 0;
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint64_t round = 0;
};

struct Block;

struct Fiber {
  Context context;
  void* stack = nullptr;
  Block* block = nullptr;
  unsigned int thread = 0;
  bool done = true;
  std::deque<std::vector<std::function<void()>>> groups;  // closed groups of work in the background
  std::vector<std::function<void()>> open;
  const char* waits_for = "";
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  dim3 index;
  Cluster* cluster = nullptr;
  unsigned int threads = 0, running = 0;
  std::vector<Fiber*> fibers;
  Barrier barriers[kBarriers];
  std::vector<Meeting> warps, groups;
  void* memory = nullptr;
  char* shared = nullptr;
};

struct Machine {
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  dim3 grid;
  unsigned int threads = 0;
  size_t shared_bytes = 0;
  uint64_t progress = 0;
  uint64_t random = 0x9e3779b97f4a7c15u;
  std::vector<void*> stacks;  // of fibers that ended

  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};
thread_local Machine machine;

void* take_stack() {
  if (!machine.stacks.empty()) {
    void* stack = machine.stacks.back();
    machine.stacks.pop_back();
    return stack;
  }
  // The lowest page stays closed: a stack that overflows ends the process instead of another thread's variables.
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for another stack");
  mprotect(stack, 4096, PROT_NONE);
  return stack;
}

void check_barrier(Block& block, int number);
void check_cluster(Cluster& cluster);

void enter() {
  (*machine.kernel)();
  Fiber& fiber = *machine.current;
  fiber.done = true;
  --fiber.block->running;
  ++machine.progress;
  check_barrier(*fiber.block, 0);  // threads that ended count as arrived
  check_cluster(*fiber.block->cluster);
  switch_context(fiber.context, machine.scheduler);
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  position.thread = dim3(fiber.thread, 0, 0);
  position.block = fiber.block->index;
  switch_context(machine.scheduler, fiber.context);
}

void open_block(Block& block, dim3 index) {
  block.index = index;
  block.threads = block.running = machine.threads;
  block.warps.resize((machine.threads + 31) / 32);
  block.groups.resize((machine.threads + 127) / 128);
  if (machine.shared_bytes > 0) {
    // The end of the memory is the end of a page, followed by a closed one.
    const size_t room = (machine.shared_bytes + 4095) / 4096 * 4096;
    block.memory = mmap(nullptr, room + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block.memory == MAP_FAILED) fail("no memory for %zu bytes of shared memory", machine.shared_bytes);
    mprotect(static_cast<char*>(block.memory) + room, 4096, PROT_NONE);
    block.shared = static_cast<char*>(block.memory) + (room - machine.shared_bytes) / 1024 * 1024;
    std::memset(block.shared, 0xff, machine.shared_bytes);
  }
  for (unsigned int t = 0; t < machine.threads; ++t) {
    auto* fiber = new Fiber;
    fiber->block = &block;
    fiber->thread = t;
    fiber->done = false;
    fiber->stack = take_stack();
    make_context(fiber->context, fiber->stack, kStackBytes, enter);
    block.fibers.push_back(fiber);
  }
}

void close_block(Block& block) {
  for (const Meeting& m : block.warps) {
    if (m.arrived != 0) fail("lanes wait at an exchange that others never reached");
  }
  for (Fiber* fiber : block.fibers) {
    machine.stacks.push_back(fiber->stack);
    delete fiber;
  }
  if (block.memory != nullptr) munmap(block.memory, (machine.shared_bytes + 4095) / 4096 * 4096 + 4096);
}

[[noreturn]] void fail_stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    for (const Fiber* fiber : block->fibers) {
      if (!fiber->done) {
        std::fprintf(stderr, "  block %u thread %u waits for %s\n", block->index.x, fiber->thread, fiber->waits_for);
      }
    }
  }
  machine.current = nullptr;
  fail("no thread can go on");
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  static const int64_t schedule = setting("FASTLM_EMULATED_SCHEDULE", 0);
  std::vector<Fiber*> order;
  for (const auto& block : blocks) order.insert(order.end(), block->fibers.begin(), block->fibers.end());
  if (schedule == 1) std::reverse(order.begin(), order.end());
  const auto held_back = static_cast<unsigned int>(schedule >= 10 ? schedule - 10 : -1);  // warp
  int idle = 0;  // turns in which nothing happened; a few are harmless, as a wait may be looked at before what it waits for
  while (!order.empty()) {
    if (schedule == 2) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.next_random() % i]);
    }
    const uint64_t before = machine.progress;
    for (Fiber* fiber : order) {
      if (fiber->thread / 32 != held_back) resume(*fiber);
    }
    if (machine.progress == before) {
      for (Fiber* fiber : order) {
        if (fiber->thread / 32 == held_back) resume(*fiber);
      }
    }
    std::erase_if(order, [](const Fiber* f) { return f->done; });
    idle = machine.progress == before ? idle + 1 : 0;
    if (idle > 3) fail_stuck(blocks);
  }
}

void wait_while(const char* what, const uint64_t& round, uint64_t old) {
  while (round == old) {
    machine.current->waits_for = what;
    yield();
  }
}

void meet(Meeting& m, unsigned int lane, unsigned int size, unsigned int expected, uint32_t mask, void* payload,
          Combine combine) {
  if (m.arrived == 0) {
    m.combine = combine;
    m.mask = mask;
    m.payloads.assign(size, nullptr);
  }
  if (m.combine != combine) fail("lanes of one warp meet at different exchanges");
  if (m.mask != mask) fail("lanes of one warp name different masks: %08x and %08x", m.mask, mask);
  if (m.payloads[lane] != nullptr) fail("a lane came twice to one exchange");
  m.payloads[lane] = payload;
  if (++m.arrived == expected) {
    combine(m.payloads.data());
    m.arrived = 0;
    ++m.round;
    ++machine.progress;
    return;
  }
  wait_while("other lanes of an exchange", m.round, m.round);
}

void release(Barrier& b) {
  b.arrived = 0;
  b.expected = 0;
  ++b.round;
  ++machine.progress;
}

void check_barrier(Block& block, int number) {
  Barrier& b = block.barriers[number];
  const int expected = number == 0 ? static_cast<int>(block.running) : b.expected;
  if (b.arrived > 0 && b.arrived >= expected) release(b);
}

void check_cluster(Cluster& cluster) {
  unsigned int running = 0;
  for (const Block* block : cluster.blocks) running += block->running;
  Barrier& b = cluster.barrier;
  if (b.arrived > 0 && b.arrived >= static_cast<int>(running)) release(b);
}

}  // namespace

void run_grid(dim3 grid, unsigned int threads, size_t shared_bytes, unsigned int together, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of %u x %u x %u blocks of %u threads cannot be launched", grid.x, grid.y, grid.z, threads);
  }
  if (shared_bytes > static_cast<size_t>(current_device().max_shared_bytes)) {
    fail("%zu bytes of shared memory are more than a block may have", shared_bytes);
  }
  const unsigned int size = together == 0 ? 1 : together;
  if (size > 8 || grid.x % size != 0) fail("a grid of %u blocks is no whole number of clusters of %u", grid.x, size);
  machine.kernel = &kernel;
  machine.grid = grid;
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  position.threads = dim3(threads, 1, 1);
  position.grid = grid;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  const auto run = [&] {
    run_blocks(blocks);
    for (const auto& block : blocks) close_block(*block);
    blocks.clear();
    clusters.clear();
  };
  for (unsigned int z = 0; z < grid.z; ++z) {
    for (unsigned int y = 0; y < grid.y; ++y) {
      for (unsigned int x = 0; x < grid.x; ++x) {
        if (x % size == 0) clusters.push_back(std::make_unique<Cluster>());
        blocks.push_back(std::make_unique<Block>());
        blocks.back()->cluster = clusters.back().get();
        clusters.back()->blocks.push_back(blocks.back().get());
        open_block(*blocks.back(), dim3(x, y, z));
        if (together != 0 && x % size == size - 1) run();
      }
    }
  }
  if (!blocks.empty()) run();
  machine.current = nullptr;
}

char* shared_memory() { return machine.current->block->shared; }
size_t shared_bytes() { return machine.shared_bytes; }

unsigned int cluster_rank() {
  const Block& block = *machine.current->block;
  return block.index.x % static_cast<unsigned int>(block.cluster->blocks.size());
}

char* shared_memory_of(unsigned int rank) {
  const auto& blocks = machine.current->block->cluster->blocks;
  if (rank >= blocks.size()) fail("block %u is not in a cluster of %zu", rank, blocks.size());
  if (blocks[rank]->running == 0) fail("block %u of the cluster has ended, and its shared memory with it", rank);
  return blocks[rank]->shared;
}

void cluster_barrier() {
  Cluster& cluster = *machine.current->block->cluster;
  Barrier& b = cluster.barrier;
  ++b.arrived;
  ++machine.progress;
  const uint64_t round = b.round;
  check_cluster(cluster);
  wait_while("the barrier of its cluster", b.round, round);
}

void yield() {
  Fiber& fiber = *machine.current;
  switch_context(fiber.context, machine.scheduler);
}

void progress() { ++machine.progress; }
uint64_t progress_so_far() { return machine.progress; }

void exchange(uint32_t mask, void* payload, Combine combine) {
  const unsigned int lane = machine.current->thread % 32;
  if ((mask >> lane & 1) == 0) fail("lane %u is not in its own mask %08x", lane, mask);
  meet(machine.current->block->warps[machine.current->thread / 32], lane, 32, static_cast<unsigned int>(__builtin_popcount(mask)),
       mask, payload, combine);
}

void exchange_group(unsigned int size, void* payload, Combine combine) {
  if (size != 128) fail("groups have 128 threads, not %u", size);
  meet(machine.current->block->groups[machine.current->thread / size], machine.current->thread % size, size, size, 0, payload,
       combine);
}

void barrier(int number, int threads, bool wait) {
  Block& block = *machine.current->block;
  if (number < 0 || number >= kBarriers) fail("barrier %d does not exist", number);
  Barrier& b = block.barriers[number];
  if (number != 0) {
    if (threads % 32 != 0) fail("barrier %d waits for %d threads, which are no whole warps", number, threads);
    if (b.arrived > 0 && b.expected != threads) fail("barrier %d waits for %d and %d threads", number, b.expected, threads);
    b.expected = threads;
  }
  ++b.arrived;
  ++machine.progress;
  const uint64_t round = b.round;
  check_barrier(block, number);
  if (wait) wait_while(number == 0 ? "__syncthreads" : "a named barrier", b.round, round);
}

void in_background(std::function<void()> work) { machine.current->open.push_back(std::move(work)); }

void close_group() {
  Fiber& fiber = *machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_groups(int pending) {
  auto& groups = machine.current->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const auto& work : groups.front()) work();
    groups.pop_front();
  }
}

void fail(const char* format, ...) {
  std::fflush(stdout);
  if (machine.current != nullptr) {
    std::fprintf(stderr, "emulated device, block (%u, %u, %u), thread %u: ", position.block.x, position.block.y, position.block.z,
                 machine.current->thread);
  } else {
    std::fprintf(stderr, "emulated device: ");
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

}  // namespace fastlm::cuda::emulation

namespace fastlm::cuda {

const Device& current_device() {
  using emulation::setting;
  static const Device device = [] {
    const auto arch = static_cast<int>(setting("FASTLM_EMULATED_ARCH", 90));
    const int shared = arch == 90 ? 227 : arch == 80 ? 163 : 99;
    return Device{arch / 10, arch % 10, static_cast<int>(setting("FASTLM_EMULATED_SMS", 4)), shared * 1024};
  }();
  return device;
}

}  // namespace fastlm::cuda

// The few functions of the CUDA runtime that launchers and adapters call.
extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error: the device is emulated"; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
}
