// Compaction in two launches: flags as bits and their number in each tile, then every block sums the numbers before its tile and
// writes positions. A single pass in which blocks wait for the sums of those before them would need counters to be cleared, which
// is a launch as well.
#include "ops/slm_loss/cuda/compact.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/launch.h"
#include "ops/slm_loss/cuda/block_sum.cuh"

namespace fastlm::slm_loss::cuda {
namespace {

using fastlm::cuda::kFullWarp;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBatch = 4;            // words of a warp whose reads are under way at once
constexpr int64_t kLeastWords = 32;  // of a tile; a word holds the flags of 32 tokens

struct Tiles {
  int64_t words, tiles, words_per_tile;
  uint32_t* bits;    // (words,)
  uint32_t* counts;  // (tiles,)
};

Tiles tiles_of(int64_t tokens, int64_t most_tiles, void* workspace) {
  const auto ceil_div = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t words = ceil_div(tokens, 32);
  const int64_t each = std::max(kLeastWords, ceil_div(words, most_tiles));
  auto* const bits = static_cast<uint32_t*>(workspace);
  return {words, std::max<int64_t>(ceil_div(words, each), 1), each, bits, bits + words};
}

template <class Label, class A>
__device__ __forceinline__ int counts_here(const CompactParams& p, int64_t token) {
  const auto label = static_cast<int64_t>(static_cast<const Label*>(p.labels)[token]);
  bool wanted = p.gradients[0] == nullptr && p.gradients[1] == nullptr && p.gradients[2] == nullptr;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (p.gradients[i] != nullptr) wanted |= static_cast<const A*>(p.gradients[i])[token] != A(0);  // true for NaN
  }
  return static_cast<int>(wanted) & static_cast<int>(label != p.ignore_index) & static_cast<int>(label >= 0) &
         static_cast<int>(label < p.vocab);
}

template <class Label, class A>
__global__ void __launch_bounds__(kThreads) mark(const __grid_constant__ CompactParams p, const Tiles tiles) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = blockIdx.x * tiles.words_per_tile, end = min(begin + tiles.words_per_tile, tiles.words);
  uint32_t own = 0;
#pragma unroll 1
  for (int64_t first = begin + warp * kBatch; first < end; first += kWarps * kBatch) {
    bool flag[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t token = 32 * (first + i) + lane;
      flag[i] = (counts_here<Label, A>(p, min(token, p.tokens - 1)) & static_cast<int>(token < p.tokens)) != 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t bits = __ballot_sync(kFullWarp, flag[i]);
      if (first + i >= end || lane != 0) continue;
      tiles.bits[first + i] = bits;
      own += static_cast<uint32_t>(__popc(bits));
    }
  }
  const Sums sums = block_sums<kThreads>(own, reinterpret_cast<uint32_t*>(fastlm::cuda::shared_memory()));
  if (threadIdx.x == 0) tiles.counts[blockIdx.x] = sums.total;
}

struct PlaceShared {
  uint32_t sums[32];
  uint32_t words[kThreads];
  uint32_t places[kThreads];
};

__global__ void __launch_bounds__(kThreads) place(const __grid_constant__ CompactParams p, const Tiles tiles) {
  auto& shared = *reinterpret_cast<PlaceShared*>(fastlm::cuda::shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x);
  uint32_t below = 0;
  for (int i = thread; i < tile; i += kThreads) below += tiles.counts[i];
  uint32_t base = block_sums<kThreads>(below, shared.sums).total;
  if (tile + 1 == tiles.tiles && thread == 0) *p.count = static_cast<int32_t>(base + tiles.counts[tile]);
  const int64_t begin = tile * tiles.words_per_tile, end = min(begin + tiles.words_per_tile, tiles.words);
  for (int64_t first = begin; first < end; first += kThreads) {
    __syncthreads();  // the shared memory of the last turn
    const uint32_t own = first + thread < end ? tiles.bits[first + thread] : 0;
    const Sums sums = block_sums<kThreads>(static_cast<uint32_t>(__popc(own)), shared.sums);
    shared.words[thread] = own;
    shared.places[thread] = base + sums.before;
    base += sums.total;
    __syncthreads();
    const int words = static_cast<int>(min(end - first, int64_t{kThreads}));
    for (int i = warp; i < words; i += kWarps) {
      const uint32_t word = shared.words[i];
      if ((word >> lane & 1) == 0) continue;
      const int at = static_cast<int>(shared.places[i]) + __popc(word & ((1u << lane) - 1));
      p.positions[at] = static_cast<int32_t>(32 * (first + i) + lane);
    }
  }
}

}  // namespace

int64_t compact_workspace_bytes(int64_t tokens, int64_t most_tiles) {
  const Tiles tiles = tiles_of(tokens, most_tiles, nullptr);
  return 4 * (tiles.words + tiles.tiles);
}

cudaError_t launch_compact(const CompactParams& p, cudaStream_t stream, int64_t most_tiles) {
  const Tiles tiles = tiles_of(p.tokens, most_tiles, p.workspace);
  const dim3 grid(static_cast<unsigned int>(tiles.tiles));
  const auto start = [&]<class Label, class A>() {
    return fastlm::cuda::launch<mark<Label, A>>(grid, kThreads, 32 * sizeof(uint32_t), stream, p, tiles);
  };
  const auto with_label = [&]<class Label>() {
    return p.doubles ? start.template operator()<Label, double>() : start.template operator()<Label, float>();
  };
  const cudaError_t status = p.labels_64 ? with_label.template operator()<int64_t>() : with_label.template operator()<int32_t>();
  if (status != cudaSuccess) return status;
  return fastlm::cuda::launch<place>(grid, kThreads, sizeof(PlaceShared), stream, p, tiles);
}

}  // namespace fastlm::slm_loss::cuda
