// Launches of plan.cuh: one block for few slots, two launches where each block can sum the counts of all, three in general; that
// many for each digit where there are more experts than fit into shared memory.
#include "ops/moe_dispatch/cuda/plan.cuh"

#include "core/cuda/launch.h"

namespace fastlm::moe_dispatch::cuda {
namespace {

constexpr int64_t kSharedInts = 12 * 1024;  // 48 KiB, which every device has
constexpr int kPlanWarps = kPlanThreads / 32;
constexpr int64_t kMostKeys = kSharedInts / (kPlanWarps + 1);
constexpr int kDigitBits = 10;
constexpr int64_t kAloneSlots = 8192;
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kSummedCounts = 4096;  // that each block sums itself
static_assert((1 << kDigitBits) <= kMostKeys);

bool in_one_pass(int64_t experts) { return experts + 1 <= kMostKeys; }

int bits_for(int64_t values) {
  int bits = 0;
  while ((int64_t{1} << bits) < values) ++bits;
  return bits;
}

// How slots are cut into blocks: a function of the problem alone.
void cut(PlanPass& pass) {
  const int64_t tiles = max_of(ceil_div(pass.call.slots, kTile), 1);
  pass.tile = ceil_div(tiles, kMostBlocks) * kTile;
  pass.blocks = static_cast<int>(max_of(ceil_div(pass.call.slots, pass.tile), 1));
}

bool alone(const PlanPass& pass) { return pass.call.slots <= kAloneSlots && pass.keys * (kAloneThreads / 32 + 1) <= kSharedInts; }

cudaError_t run(PlanPass pass, cudaStream_t stream) {
  using fastlm::cuda::launch;
  const size_t key_bytes = static_cast<size_t>(pass.keys) * sizeof(int32_t);
  if (alone(pass)) {
    pass.tile = pass.call.slots;
    pass.blocks = 1;
    return launch<place_slots<kAloneThreads, true>>(dim3(1), kAloneThreads, key_bytes * (kAloneThreads / 32 + 1), stream, pass);
  }
  if (static_cast<int64_t>(pass.keys) * pass.blocks <= kSummedCounts) pass.totals = nullptr;
  const dim3 grid(static_cast<unsigned int>(pass.blocks));
  if (const cudaError_t status = launch<count_keys>(grid, kPlanThreads, key_bytes, stream, pass); status != cudaSuccess) {
    return status;
  }
  if (pass.totals != nullptr) {
    const dim3 keys(static_cast<unsigned int>(ceil_div(pass.keys, kPlanWarps)));
    if (const cudaError_t status = launch<scan_counts>(keys, kPlanThreads, 0, stream, pass); status != cudaSuccess) {
      return status;
    }
  }
  return launch<place_slots<kPlanThreads, false>>(grid, kPlanThreads, key_bytes * (kPlanWarps + 1), stream, pass);
}

}  // namespace

size_t plan_workspace(int64_t slots, int64_t experts) {
  PlanPass pass{};
  pass.call.slots = slots;
  cut(pass);
  const int64_t keys = in_one_pass(experts) ? experts + 1 : int64_t{1} << kDigitBits;
  const int64_t kept = in_one_pass(experts) ? 0 : slots;  // slots between two passes
  return static_cast<size_t>(keys * pass.blocks + keys + kept) * sizeof(int32_t);
}

cudaError_t launch_plan(const PlanCall& call, cudaStream_t stream) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1;
  if (call.slots > kLimit || call.experts >= kLimit) return cudaErrorInvalidValue;
  PlanPass pass{};
  pass.call = call;
  cut(pass);
  if (in_one_pass(call.experts)) {
    pass.to = call.perm;
    pass.keys = static_cast<int>(call.experts + 1);
    pass.bits = bits_for(pass.keys);
    pass.whole = pass.last = true;
    pass.counts = static_cast<int32_t*>(call.workspace);
    pass.totals = pass.counts + static_cast<int64_t>(pass.keys) * pass.blocks;
    return run(pass, stream);
  }
  const int bits = bits_for(call.experts + 1);
  const int passes = static_cast<int>(ceil_div(bits, kDigitBits));
  pass.bits = static_cast<int>(ceil_div(bits, passes));
  pass.keys = 1 << pass.bits;
  pass.counts = static_cast<int32_t*>(call.workspace);
  pass.totals = pass.counts + static_cast<int64_t>(pass.keys) * pass.blocks;
  int32_t* between = pass.totals + pass.keys;
  for (int i = 0; i < passes; ++i) {
    // The last pass writes to perm, those before take turns.
    const bool to_perm = (passes - 1 - i) % 2 == 0;
    pass.from = i == 0 ? nullptr : to_perm ? between : call.perm;
    pass.to = to_perm ? call.perm : between;
    pass.shift = i * pass.bits;
    pass.last = i == passes - 1;
    if (const cudaError_t status = run(pass, stream); status != cudaSuccess) return status;
  }
  const dim3 grid(fastlm::cuda::limited(ceil_div(call.experts + 1, kPlanThreads), int64_t{1} << 16));
  return fastlm::cuda::launch<find_offsets>(grid, kPlanThreads, 0, stream, call);
}

}  // namespace fastlm::moe_dispatch::cuda
