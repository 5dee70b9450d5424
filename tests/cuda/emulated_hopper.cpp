// Kernels in the words of sm_90a, right or wrong in one way each, for the tests of their emulation. Where elements lie is
// computed here by the figures of the PTX manual (matrix-descriptor and tensor-map swizzles), not by the code under test. argv[1]
// names a case; the process ends well, with a wrong result (status 1), or as emulation::fail ends it.
#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.h"

#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace {

using namespace fastlm;
using namespace fastlm::cuda;

constexpr int kM = 64, kN = 128, kDepth = 64;

float left(int m, int k) { return static_cast<float>((m * 7 + k * 3) % 13 - 6); }
float right(int n, int k) { return static_cast<float>((n * 5 + k * 11) % 9 - 4); }

// Byte of element (row, column) of a panel with rows of 128 bytes: 16-byte pieces of row r lie at places p ^ (r % 8).
int swizzled_byte(int row, int column) { return row * 128 + ((column / 8 ^ row % 8) * 16) + column % 8 * 2; }
void put(char* to, float x) {
  const bfloat16 value = from_acc<bfloat16>(x);
  std::memcpy(to, &value, 2);
}

// a at 0: K-major (64, 64), or MN-major: rows are the depth. b at 16384: K-major (128, 64), or two MN-major panels of 64.
__global__ void multiply(float* out, Major a_major, Major b_major, bool registers, bool fence, bool wait) {
  char* shared = shared_memory();
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    for (int k = 0; k < kDepth; ++k) {
      for (int m = 0; m < kM; ++m) {
        put(shared + (a_major == Major::kK ? swizzled_byte(m, k) : swizzled_byte(k, m)), left(m, k));
      }
      for (int n = 0; n < kN; ++n) {
        put(shared + 16384 + (b_major == Major::kK ? swizzled_byte(n, k) : n / 64 * 8192 + swizzled_byte(k, n % 64)),
            right(n, k));
      }
    }
  }
  fence_async_shared();
  __syncthreads();
  float d[kN / 2];
  uint32_t a[4][4];
  const int lane = t % 32, row = t / 32 * 16 + lane / 4, column = lane % 4 * 2;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int m = row + i % 2 * 8, from = 16 * k + column + i / 2 * 8;
      a[k][i] = pack_pair<bfloat16>(left(m, from), left(m, from + 1));
    }
  }
  const uint64_t a_operand = swizzled_operand(shared, 16, 1024), b_operand = swizzled_operand(shared + 16384, 8192, 1024);
  if (fence) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t b = operand_at(b_operand, b_major == Major::kK ? 32 * k : 2048 * k);
    const uint64_t l = operand_at(a_operand, a_major == Major::kK ? 32 * k : 2048 * k);
    if (registers && b_major == Major::kK) wgmma<bfloat16, kN, Major::kK>(d, a[k], b, k > 0);
    if (registers && b_major == Major::kMN) wgmma<bfloat16, kN, Major::kMN>(d, a[k], b, k > 0);
    if (!registers && a_major == Major::kK) wgmma<bfloat16, kN, Major::kK, Major::kK>(d, l, b, k > 0);
    if (!registers && a_major == Major::kMN) wgmma<bfloat16, kN, Major::kMN, Major::kMN>(d, l, b, k > 0);
  }
  wgmma_commit();
  if (wait) wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) out[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2] = d[i];
  if (!wait) wgmma_wait<0>();
}

bool product(Major a, Major b, bool registers, bool fence = true, bool wait = true) {
  std::vector<float> out(kM * kN, -1.0f);
  launch<multiply>(dim3(1), 128, 65536, nullptr, out.data(), a, b, registers, fence, wait);
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += left(m, k) * right(n, k);
      if (!(out[static_cast<size_t>(m * kN + n)] == sum)) return false;
    }
  }
  return true;
}

// A box of 16 positions at (32, 1, 5, 1) of a tensor of 40 columns, 2 heads, 12 positions, 2 rows: columns from 40 and positions
// from 12 on are not there.
__global__ void bring_tile(const __grid_constant__ TensorMap map, float* out, bool wait, int arrivals) {
  char* shared = shared_memory();
  auto* full = reinterpret_cast<Mbarrier*>(shared + 4096);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, 2048);
    load_tile(shared, map, full, 32, 1, 5, 1);
    for (int i = 1; i < arrivals; ++i) mbarrier_arrive(full);
  }
  if (wait) mbarrier_wait(full, 0);
  for (int row = 0; row < 16; ++row) {
    for (int column = static_cast<int>(threadIdx.x); column < 64; column += 32) {
      bfloat16 x;
      std::memcpy(&x, shared + swizzled_byte(row, column), 2);
      out[row * 64 + column] = to_acc(x);
    }
  }
  __syncwarp();
  if (!wait) mbarrier_wait(full, 0);
}

bool tile(bool wait = true, int arrivals = 1) {
  alignas(16) static bfloat16 tensor[2 * 12 * 2 * 40];
  for (int i = 0; i < 2 * 12 * 2 * 40; ++i) tensor[i] = from_acc<bfloat16>(static_cast<float>(i % 251));
  TensorMap map;
  if (make_tensor_map(map, DType::kBFloat16, {tensor, {40, 2, 12, 2}, {80, 160, 1920}, {64, 1, 16, 1}}) != cudaSuccess)
    return false;
  std::vector<float> out(1024, -1.0f);
  launch<bring_tile>(dim3(1), 32, 8192, nullptr, map, out.data(), wait, arrivals);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 64; ++column) {
      const int position = 5 + row, c = 32 + column;
      const float expected = position < 12 && c < 40 ? static_cast<float>(((12 + position) * 2 + 1) * 40 % 251 + c) : 0.0f;
      const float x = out[static_cast<size_t>(row * 64 + column)];
      if (!(x == (expected >= 251.0f ? expected - 251.0f : expected))) return false;
    }
  }
  return true;
}

// Blocks of a cluster copy one half of a tile of 32 positions each, to both of them, for two rounds in the same place.
__global__ void share_tiles(const __grid_constant__ TensorMap map, float* out, bool wait, bool stay) {
  char* shared = shared_memory();
  auto* full = reinterpret_cast<Mbarrier*>(shared + 4096);
  auto* empty = full + 1;
  const int lane = static_cast<int>(threadIdx.x), rank = cluster_rank();
  if (lane == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 2);
    mbarrier_fence_init();
  }
  cluster_sync();
  for (int round = 0; round < 2; ++round) {
    if (lane == 0) {
      if (wait) mbarrier_wait(empty, round ^ 1);
      mbarrier_arrive_expect(full, 4096);
      load_tile_to_blocks(shared + 2048 * rank, map, full, 3, 0, 32 * round + 16 * rank, 0, 0);
    }
    mbarrier_wait(full, round);
    cluster_sync();
    for (int i = 0; i < 2 * rank; ++i) fastlm::cuda::pause();  // the second block is slower
    for (int row = 0; row < 32; ++row) {
      for (int i = 0; i < 2; ++i) {
        bfloat16 x;
        std::memcpy(&x, shared + swizzled_byte(row, lane + 32 * i), 2);
        out[((blockIdx.x * 2 + round) * 32 + row) * 64 + lane + 32 * i] = to_acc(x);
      }
    }
    __syncwarp();
    mbarrier_arrive_at(empty, lane % 2, lane < 2);
  }
  if (stay || rank == 1) cluster_sync();
}

bool cluster(bool wait = true, bool stay = true, unsigned int blocks = 4) {
  alignas(16) static bfloat16 tensor[64 * 64];
  for (int i = 0; i < 64 * 64; ++i) tensor[i] = from_acc<bfloat16>(static_cast<float>(i % 251));
  TensorMap map;
  if (make_tensor_map(map, DType::kBFloat16, {tensor, {64, 64, 1, 1}, {128, 16, 16}, {64, 16, 1, 1}}) != cudaSuccess)
    return false;
  std::vector<float> out(4 * 64 * 64, -1.0f);
  launch_clusters<share_tiles>(2, dim3(blocks), 32, 8192, nullptr, map, out.data(), wait, stay);
  for (int i = 0; i < 4 * 64 * 64; ++i) {
    if (!(out[static_cast<size_t>(i)] == static_cast<float>(i % 4096 % 251))) return false;
  }
  return true;
}

__global__ void use_before_init() { mbarrier_arrive(reinterpret_cast<Mbarrier*>(shared_memory())); }

// Phases: 0 ends, then 1; a wait for the one before the current passes.
__global__ void phases(int* out) {
  auto* b = reinterpret_cast<Mbarrier*>(shared_memory());
  if (threadIdx.x == 0) mbarrier_init(b, 32);
  __syncthreads();
  mbarrier_wait(b, 1);
  for (int phase = 0; phase < 3; ++phase) {
    mbarrier_arrive(b);
    mbarrier_wait(b, phase % 2);
  }
  out[threadIdx.x] = 1;
}

bool all_phases() {
  std::vector<int> out(32, 0);
  launch<phases>(dim3(1), 32, 1024, nullptr, out.data());
  for (const int x : out) {
    if (x != 1) return false;
  }
  return true;
}

// Parts of a sum from shared memory, one stored, one added.
__global__ void add_parts(float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = 1.5f;
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;
  store_bulk(out, shared, 128);
  commit_bulk();
  wait_bulk();
  add_bulk(out, shared, 64);
  commit_bulk();
  wait_bulk();
}

bool bulk() {
  alignas(16) float out[32] = {};
  launch<add_parts>(dim3(1), 32, 1024, nullptr, static_cast<float*>(out));
  for (int i = 0; i < 32; ++i) {
    if (out[i] != (i < 16 ? 3.0f : 1.5f)) return false;
  }
  return true;
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, bool (*)()> cases = {
      {"shared_k_k", [] { return product(Major::kK, Major::kK, false); }},
      {"shared_mn_mn", [] { return product(Major::kMN, Major::kMN, false); }},
      {"registers_k", [] { return product(Major::kK, Major::kK, true); }},
      {"registers_mn", [] { return product(Major::kK, Major::kMN, true); }},
      {"tile", [] { return tile(); }},
      {"phases", all_phases},
      {"bulk", bulk},
      {"cluster", [] { return cluster(); }},
      {"cluster_without_wait", [] { return cluster(false); }},
      {"block_that_leaves", [] { return cluster(true, false); }},
      {"half_a_cluster", [] { return cluster(true, true, 3); }},
      {"product_without_wait", [] { return product(Major::kK, Major::kK, false, true, false); }},
      {"tile_without_wait", [] { return tile(false); }},
      {"product_without_fence", [] { return product(Major::kK, Major::kK, false, false); }},
      {"one_arrival_more", [] { return tile(true, 2); }},
      {"use_before_init",
       [] {
         launch<use_before_init>(dim3(1), 32, 1024, nullptr);
         return true;
       }},
  };
  const auto found = cases.find(argv[1]);
  if (found == cases.end()) return 2;
  return found->second() ? 0 : 1;
}
