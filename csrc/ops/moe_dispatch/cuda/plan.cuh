// Stable counting sort of picks by expert. A warp takes slots that follow each other: lanes with the same key find each other by
// votes, one for each bit of the key, and count in the order of lanes; then come warps, then blocks. Integers in a fixed order,
// so the result is that of the CPU.
//
// Where the keys do not fit into shared memory, digits of them are sorted one after the other, the lowest first.
#pragma once

#include "core/cuda/device.cuh"
#include "core/integers.h"
#include "ops/moe_dispatch/cuda/plan.h"

namespace fastlm::moe_dispatch::cuda {

using fastlm::cuda::kFullWarp;

constexpr int kPlanThreads = 256;  // of a block beside others
constexpr int kAloneThreads = 1024;
constexpr int kRounds = 4;  // slots of a thread in a tile
constexpr int64_t kTile = kPlanThreads * kRounds;

// One pass over all slots: the whole sort, or one digit of it.
struct PlanPass {
  PlanCall call;
  const int32_t* from;  // slots in the order of the passes before; null: their own order
  int32_t* to;          // slots in the order of this one
  int shift, bits;      // of the digit
  int keys;             // different values of it
  bool whole, last;     // whole: the only pass, which gives the offsets too
  int blocks;
  int64_t tile;     // slots of a block, a multiple of kTile unless alone
  int32_t* counts;  // (keys, blocks); after scan_counts the slots of the same key in earlier blocks
  int32_t* totals;  // (keys,), or null: each block sums `counts` itself
};

// The expert of a slot, `experts` for none.
__device__ __forceinline__ uint32_t key_of(const PlanCall& call, uint32_t slot) {
  const auto picks = static_cast<uint32_t>(call.top_k);
  int64_t place = slot;
  if (call.pick_stride != 1 || call.token_stride != call.top_k) {
    const uint32_t token = slot / picks;
    place = token * call.token_stride + (slot - token * picks) * call.pick_stride;
  }
  const int64_t id = fastlm::cuda::load_index(call.ids, call.ids_64, place);
  return static_cast<uint32_t>(id >= 0 && id < call.experts ? id : call.experts);
}

__device__ __forceinline__ uint32_t slot_at(const PlanPass& pass, int64_t place) {
  return static_cast<uint32_t>(pass.from == nullptr ? place : pass.from[place]);
}
__device__ __forceinline__ int digit_of(const PlanPass& pass, uint32_t slot) {
  return static_cast<int>(key_of(pass.call, slot) >> pass.shift & ((1u << pass.bits) - 1));
}

// Lanes of the warp that exist and have this lane's key.
__device__ __forceinline__ uint32_t lanes_alike(int key, int bits, bool exists) {
  uint32_t alike = __ballot_sync(kFullWarp, exists);
  for (int i = 0; i < bits; ++i) {
    const bool one = (key >> i & 1) != 0;
    const uint32_t ones = __ballot_sync(kFullWarp, one);
    alike &= one ? ones : ~ones;
  }
  return alike;
}

__device__ __forceinline__ int inclusive_sum(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kFullWarp, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

// Turns `values` (n) into the sums of those before, by the block's first warp.
__device__ __forceinline__ void sum_before(int32_t* values, int n) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return;
  int so_far = 0;
  for (int base = 0; base < n; base += 32) {
    const int own = base + lane < n ? values[base + lane] : 0;
    const int sum = so_far + inclusive_sum(own, lane);
    if (base + lane < n) values[base + lane] = sum - own;
    so_far = __shfl_sync(kFullWarp, sum, 31);
  }
}

// Slots of each key in one block. Shared: keys.
__global__ void __launch_bounds__(kPlanThreads) count_keys(const PlanPass pass) {
  auto* counts = reinterpret_cast<int32_t*>(fastlm::cuda::shared_memory());
  for (int k = static_cast<int>(threadIdx.x); k < pass.keys; k += kPlanThreads) counts[k] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * pass.tile;
  const int64_t end = min_of(begin + pass.tile, pass.call.slots);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPlanThreads) {
    atomicAdd(&counts[digit_of(pass, slot_at(pass, i))], 1);
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < pass.keys; k += kPlanThreads) {
    pass.counts[static_cast<int64_t>(k) * pass.blocks + blockIdx.x] = counts[k];
  }
}

// One warp to a key: the sums of earlier blocks, and the total.
__global__ void __launch_bounds__(kPlanThreads) scan_counts(const PlanPass pass) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int key = static_cast<int>(blockIdx.x * (kPlanThreads / 32) + threadIdx.x / 32);
  if (key >= pass.keys) return;
  int32_t* counts = pass.counts + static_cast<int64_t>(key) * pass.blocks;
  int so_far = 0;
  for (int base = 0; base < pass.blocks; base += 32) {
    const int own = base + lane < pass.blocks ? counts[base + lane] : 0;
    const int sum = so_far + inclusive_sum(own, lane);
    if (base + lane < pass.blocks) counts[base + lane] = sum - own;
    so_far = __shfl_sync(kFullWarp, sum, 31);
  }
  if (lane == 0) pass.totals[key] = so_far;
}

// Brings the slots of a block to their places. kAlone: one block, which counts all of its slots first.
// Shared: next place of each key (keys), slots of each warp and key (kThreads / 32, keys).
template <int kThreads, bool kAlone>
__global__ void __launch_bounds__(kThreads) place_slots(const PlanPass pass) {
  constexpr int kWarps = kThreads / 32;
  const PlanCall& call = pass.call;
  const int keys = pass.keys;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  auto* next = reinterpret_cast<int32_t*>(fastlm::cuda::shared_memory());
  int32_t* of_warps = next + keys;
  int32_t* of_warp = of_warps + static_cast<int64_t>(warp) * keys;
  const int64_t block = kAlone ? 0 : blockIdx.x;
  const int64_t begin = block * pass.tile;
  const int64_t end = min_of(begin + pass.tile, call.slots);

  // Slots of each key in the whole problem, and of those the ones before this block.
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
    next[k] = kAlone || pass.totals == nullptr ? 0 : pass.totals[k];
  }
  __syncthreads();
  if constexpr (kAlone) {
    for (int64_t i = threadIdx.x; i < call.slots; i += kThreads) atomicAdd(&next[digit_of(pass, slot_at(pass, i))], 1);
    __syncthreads();
  } else if (pass.totals == nullptr) {
    for (int k = warp; k < keys; k += kWarps) {
      int all = 0, before = 0;
      for (int b = lane; b < pass.blocks; b += 32) {
        const int own = pass.counts[static_cast<int64_t>(k) * pass.blocks + b];
        all += own;
        before += b < block ? own : 0;
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        all += __shfl_xor_sync(kFullWarp, all, distance);
        before += __shfl_xor_sync(kFullWarp, before, distance);
      }
      if (lane == 0) next[k] = all, of_warps[k] = before;
    }
    __syncthreads();
  }
  sum_before(next, keys);
  __syncthreads();
  if (pass.whole && block == 0) {
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) call.offsets[k] = next[k];
  }
  if constexpr (!kAlone) {
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
      next[k] += pass.totals == nullptr ? of_warps[k] : pass.counts[static_cast<int64_t>(k) * pass.blocks + block];
    }
  }

  for (int64_t tile = begin; tile < end; tile += kThreads * kRounds) {
    __syncthreads();  // the tile before, and the sums that stood in of_warps
    for (int i = static_cast<int>(threadIdx.x); i < kWarps * keys; i += kThreads) of_warps[i] = 0;
    __syncthreads();
    uint32_t slot[kRounds] = {};
    int key[kRounds], rank[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t place = tile + (warp * kRounds + r) * 32 + lane;
      key[r] = -1;
      if (place < end) {
        slot[r] = slot_at(pass, place);
        key[r] = digit_of(pass, slot[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const bool exists = key[r] >= 0;
      const uint32_t alike = lanes_alike(key[r], pass.bits, exists);
      const uint32_t before = alike & ((1u << lane) - 1);
      rank[r] = __popc(before) + (exists ? of_warp[key[r]] : 0);
      __syncwarp();
      if (exists && before == 0) of_warp[key[r]] += __popc(alike);
      __syncwarp();
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
      int so_far = next[k];
      for (int w = 0; w < kWarps; ++w) {
        const int own = of_warps[w * keys + k];
        of_warps[w * keys + k] = so_far;
        so_far += own;
      }
      next[k] = so_far;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (key[r] < 0) continue;
      const int row = of_warp[key[r]] + rank[r];
      pass.to[row] = static_cast<int32_t>(slot[r]);
      if (!pass.last) continue;
      call.inv[slot[r]] = row;
      if (call.tokens != nullptr) call.tokens[row] = static_cast<int32_t>(slot[r] / static_cast<uint32_t>(call.top_k));
    }
  }
}

// Where each expert begins in the sorted slots, by bisection.
__global__ void __launch_bounds__(kPlanThreads) find_offsets(const PlanCall call) {
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x; e <= call.experts;
       e += static_cast<int64_t>(gridDim.x) * kPlanThreads) {
    int64_t low = 0, high = call.slots;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (key_of(call, static_cast<uint32_t>(call.perm[middle])) < e) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    call.offsets[e] = static_cast<int32_t>(low);
  }
}

}  // namespace fastlm::moe_dispatch::cuda
