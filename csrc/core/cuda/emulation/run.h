// Runs kernels on the host, for tests where there is no GPU: every thread of a block is a fiber with a stack of its own, which
// runs until it waits for others. Barriers, exchanges of a warp and waits on memory are what they are on the device; a wait that
// can never end, lanes that disagree about an exchange and shared memory that was never written (it starts as NaN) are found. It
// says nothing about speed, and races show only if the order of threads matters: FASTLM_EMULATED_SCHEDULE picks the order (0
// ascending, 1 descending, 2 shuffled at every turn, 10 + w: warp w of every block runs only when no other thread can go on).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

// What the compiler sees instead of CUDA's words.
#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastlm::cuda::emulation {

// The numbers of the running thread.
struct Position {
  dim3 thread, block, threads, grid;
};
extern thread_local Position position;

// Runs `kernel` for every thread of a grid of blocks of `threads` threads. `together`: the blocks along x that run at once, so
// that they may wait for each other: 1, the size of clusters, or 0 for all of the grid.
void run_grid(dim3 grid, unsigned int threads, size_t shared_bytes, unsigned int together, const std::function<void()>& kernel);

// The shared memory of the running block, aligned to 1024 bytes, and its size.
char* shared_memory();
size_t shared_bytes();

// The running block's cluster: its number there, and the shared memory of block `rank`, which must not have ended.
unsigned int cluster_rank();
char* shared_memory_of(unsigned int rank);
// All threads of the cluster that still run.
void cluster_barrier();

// Lets other threads run. Called in every loop that waits for something another thread does; `progress` is called by whoever does
// such a thing. A block in which nobody makes progress is an error.
void yield();
void progress();
uint64_t progress_so_far();

// The lanes of the running warp named by `mask` (or, for `size` > 32, an aligned group of as many threads) meet at one exchange:
// each brings a payload, the last to arrive calls `combine` with the payloads by lane (null for lanes outside), all go on after.
// `combine` also tells exchanges apart: lanes that meet with different ones are an error.
using Combine = void (*)(void** payloads);
void exchange(uint32_t mask, void* payload, Combine combine);
void exchange_group(unsigned int size, void* payload, Combine combine);

// bar.sync / bar.arrive; number 0 with all threads of the block that still run is __syncthreads.
void barrier(int number, int threads, bool wait);

// Work that a thread has under way in the background (asynchronous copies): closed into groups, done at the latest at a wait.
void in_background(std::function<void()> work);
void close_group();
void wait_groups(int pending);

// Stops the process with a message that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...);

}  // namespace fastlm::cuda::emulation

#define threadIdx (::fastlm::cuda::emulation::position.thread)
#define blockIdx (::fastlm::cuda::emulation::position.block)
#define blockDim (::fastlm::cuda::emulation::position.threads)
#define gridDim (::fastlm::cuda::emulation::position.grid)
