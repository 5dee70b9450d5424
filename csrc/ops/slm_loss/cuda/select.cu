// Launches of the choice of tokens. One block for each segment while segments are short or many; several, all at once on the
// device, where one would take longer than their barriers.
#include "ops/slm_loss/cuda/select.h"

#include <algorithm>

#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/slm_loss/cuda/select.cuh"

namespace fastlm::slm_loss::cuda {
namespace {

constexpr int kFewThreads = 256, kManyThreads = 1024;
constexpr int64_t kFewTokens = 2048;            // of a segment, for the few threads
constexpr int64_t kOneBlockBytes = 160 * 1024;  // of keys; more take longer than three barriers
constexpr int64_t kLeastShare = 4096;           // tokens of one of several blocks

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) select(const __grid_constant__ SelectParams p, int blocks, int capacity) {
  Selector<T, kThreads>(p, blocks, capacity).run();
}

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

}  // namespace

SelectPlan plan_select(int64_t total, int64_t segments, DType dtype, bool random_ties) {
  const fastlm::cuda::Device& device = fastlm::cuda::current_device();
  const int64_t key_bytes = dtype == DType::kFloat64 ? 8 : 4;
  const int64_t most = (device.max_shared_bytes - static_cast<int64_t>(sizeof(SelectShared))) / key_bytes;
  const int64_t one_block = std::min(kOneBlockBytes / key_bytes, most);
  SelectPlan plan{1, kManyThreads, 0, 0};
  int64_t keys = total;  // that a block will hold, most likely
  if (segments > 0 && total > one_block * std::min<int64_t>(segments, 4)) {
    plan.blocks = static_cast<int32_t>(std::clamp<int64_t>(device.num_sms / segments, 1, ceil_div(total, kLeastShare)));
  }
  if (plan.blocks > 1) {
    keys = ceil_div(total, plan.blocks);
    const int64_t passes = (key_bytes == 8 ? kPasses<uint64_t> : kPasses<uint32_t>)+(random_ties ? kOrderPasses : 0);
    plan.workspace_bytes = 4 * (counters_of(segments, plan.blocks) + segments * passes * kDigits);
  } else if (segments > 1) {
    const int64_t average = ceil_div(total, segments);
    if (average <= kFewTokens) plan.threads = kFewThreads;
    if (segments > device.num_sms) keys = std::min(total, 2 * average);
  }
  keys += 2 * kGroup + 4 * kRow;  // groups cut by bounds, and whole batches of rows
  plan.capacity = static_cast<int32_t>(std::min(keys, most) / kRow * kRow);
  return plan;
}

cudaError_t launch_select(const SelectParams& p, const SelectPlan& plan, DType dtype, cudaStream_t stream) {
  if (p.segments == 0) return cudaSuccess;  // and no tokens: the adapter has checked that
  if (plan.workspace_bytes > 0) {
    const cudaError_t status = cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(plan.workspace_bytes), stream);
    if (status != cudaSuccess) return status;
  }
  const dim3 grid(static_cast<unsigned int>(p.segments * plan.blocks));
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    const size_t shared = sizeof(SelectShared) + static_cast<size_t>(plan.capacity) * sizeof(KeyOf<T>);
    const int blocks = plan.blocks, capacity = plan.capacity;
    if (blocks > 1) {
      return fastlm::cuda::launch_cooperative<select<T, kManyThreads>>(grid, kManyThreads, shared, stream, p, blocks, capacity);
    }
    if (plan.threads == kFewThreads) {
      return fastlm::cuda::launch<select<T, kFewThreads>>(grid, kFewThreads, shared, stream, p, blocks, capacity);
    }
    return fastlm::cuda::launch<select<T, kManyThreads>>(grid, kManyThreads, shared, stream, p, blocks, capacity);
  });
}

}  // namespace fastlm::slm_loss::cuda
