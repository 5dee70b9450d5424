// Small kernels that are right or wrong in one way each, for the tests of the emulated device. argv[1] names one; the process
// ends well, with a wrong result (status 1), or as emulation::fail ends it.
#include "core/cuda/device.cuh"
#include "core/cuda/launch.h"

#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace {

using namespace fastlm;
using namespace fastlm::cuda;

template <class T>
T* shared_array() {
  return reinterpret_cast<T*>(cuda::shared_memory());
}

__global__ void reverse_block(int* x, bool sync) {
  int* shared = shared_array<int>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncthreads();
  x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void read_unwritten(float* x) { x[threadIdx.x] = shared_array<float>()[threadIdx.x]; }

__global__ void divergent_exchange(int* x) {
  if (threadIdx.x % 2 == 0) {
    x[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 2);
  } else {
    x[threadIdx.x] = static_cast<int>(__ballot_sync(kFullWarp, true));
  }
}

__global__ void half_a_barrier(int*) {
  if (threadIdx.x < 32) sync_named(1, 64);
}

__global__ void early_exit(int* x) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}

__global__ void copy_through_shared(const float* from, float* to, bool wait) {
  float* shared = shared_array<float>();
  copy_async<16>(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x != 7);
  commit_copies();
  copy_async<16>(shared + 128 + 4 * threadIdx.x, from + 4 * threadIdx.x);
  commit_copies();
  if (wait) wait_copies<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = shared[127 - 4 * threadIdx.x - i];
  wait_copies<0>();
}

__global__ void copy_outside(const float* from) { copy_async<16>(shared_array<float>() + 4 * threadIdx.x, from); }

__global__ void meet_across_blocks(int* counter, int* seen) {
  if (threadIdx.x == 0) {
    add_release(counter, 1);
    while (load_acquire(counter) < static_cast<int>(gridDim.x)) cuda::pause();
  }
  __syncthreads();
  seen[blockIdx.x * blockDim.x + threadIdx.x] = *counter;
}

// D = A B for a 16x16 and a 16x8 matrix in row-major shared memory, through load_matrix_x4.
__global__ void multiply(const float* a, const float* b, float* d) {
  auto* sa = shared_array<bfloat16>();
  bfloat16* sb = sa + 256;
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) sa[i] = from_acc<bfloat16>(a[i]);
  // Twice as wide as B, the right half empty: four 8x8 matrices for one load.
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) {
    sb[i] = from_acc<bfloat16>(i % 16 < 8 ? b[i / 16 * 8 + i % 16] : 0.0f);
  }
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t fa[4], fb[4];
  load_matrix_x4(fa, sa + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
  load_matrix_x4_transposed(fb, sb + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
  float sum[4] = {0, 0, 0, 0};
  mma_m16n8k16<bfloat16>(sum, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
}

__global__ void sums(float* x) { x[threadIdx.x] = warp_sum(x[threadIdx.x]); }

bool run_reverse(bool sync) {
  std::vector<int> x(64);
  for (int i = 0; i < 64; ++i) x[static_cast<size_t>(i)] = i;
  launch<reverse_block>(dim3(1), 64, 256, nullptr, x.data(), sync);
  for (int i = 0; i < 64; ++i) {
    if (x[static_cast<size_t>(i)] != 63 - i) return false;
  }
  return true;
}

bool run_copy(bool wait) {
  std::vector<float> from(128), to(128);
  for (int i = 0; i < 128; ++i) from[static_cast<size_t>(i)] = static_cast<float>(i);
  launch<copy_through_shared>(dim3(1), 32, 1024, nullptr, static_cast<const float*>(from.data()), to.data(), wait);
  for (int i = 0; i < 128; ++i) {
    if (to[static_cast<size_t>(127 - i)] != (i / 4 == 7 ? 0.0f : static_cast<float>(i))) return false;
  }
  return true;
}

bool run_multiply() {
  std::vector<float> a(256), b(128), d(128);
  for (int i = 0; i < 256; ++i) a[static_cast<size_t>(i)] = static_cast<float>(i * 7 % 13 - 6);
  for (int i = 0; i < 128; ++i) b[static_cast<size_t>(i)] = static_cast<float>(i * 5 % 11 - 5);
  launch<multiply>(dim3(1), 32, 1024, nullptr, static_cast<const float*>(a.data()), static_cast<const float*>(b.data()),
                   d.data());
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      float want = 0;
      for (size_t k = 0; k < 16; ++k) want += a[i * 16 + k] * b[k * 8 + j];
      if (d[i * 8 + j] != want) return false;
    }
  }
  return true;
}

bool run_meeting() {
  int counter = 0;
  std::vector<int> seen(5 * 32);
  launch_cooperative<meet_across_blocks>(dim3(5), 32, 0, nullptr, &counter, seen.data());
  for (const int n : seen) {
    if (n != 5) return false;
  }
  return true;
}

template <auto kKernel, class T>
bool run_on(size_t threads, size_t shared_bytes, T want) {
  std::vector<T> x(threads, T(1));
  launch<kKernel>(dim3(1), static_cast<unsigned int>(threads), shared_bytes, nullptr, x.data());
  for (const T& value : x) {
    if (!(value == want)) return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<float> numbers(256, 1.0f);
  const std::map<std::string, std::function<bool()>> cases{
      {"reverse", [] { return run_reverse(true); }},
      {"reverse_without_barrier", [] { return run_reverse(false); }},
      {"copy", [] { return run_copy(true); }},
      {"copy_without_wait", [] { return run_copy(false); }},
      {"copy_outside",
       [&] {
         launch<copy_outside>(dim3(1), 32, 256, nullptr, numbers.data());
         return true;
       }},
      {"unwritten", [] { return run_on<read_unwritten>(32, 128, 1.0f); }},
      {"divergent", [] { return run_on<divergent_exchange>(32, 0, 1); }},
      {"half_a_barrier", [] { return run_on<half_a_barrier>(64, 0, 1); }},
      {"early_exit", [] { return run_on<early_exit>(64, 0, 1); }},
      {"meeting", run_meeting},
      {"multiply", run_multiply},
      {"sums", [] { return run_on<sums>(64, 0, 32.0f); }},
      {"too_much_shared", [] { return run_on<sums>(64, 300 * 1024, 32.0f); }},
  };
  return cases.at(arguments[1])() ? 0 : 1;
}
