// The step as one cooperative launch: every phase by all blocks, a barrier of the grid between them. A block begins the stream of
// the next product's weights before it waits, so that the memory is kept busy while norms are taken and stragglers come in. For
// 16-bit elements.
#include "core/cuda/dispatch.h"
#include "core/cuda/grid_barrier.cuh"
#include "core/cuda/launch.h"
#include "ops/samba_decode_step/cuda/launch.h"
#include "ops/samba_decode_step/cuda/product.cuh"
#include "ops/samba_decode_step/cuda/state.cuh"
#include "ops/sliding_window_attention/cuda/update.cuh"

namespace fastlm::samba_decode_step::cuda {
namespace {

namespace attention = sliding_window_attention::cuda;

constexpr int kAttentionTeams = kThreads / attention::kUpdateThreads;
constexpr int kBlocksPerSm = 2;

__device__ __forceinline__ Share share_of(int i, int block, int blocks, const BlockTeam& team) {
  return i == kSteps ? state_share(block, blocks, team) : product_share(block, blocks, team);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    whole(const __grid_constant__ StepParams p, const __grid_constant__ attention::UpdatePlan plan, int32_t* const counter) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const BlockTeam team{thread, 1};
  char* const stages = fastlm::cuda::shared_memory();
  char* const shared = stages + kStageBytes;
  Piece<T>* const slots = reinterpret_cast<Piece<T>*>(stages) + thread;
  fastlm::cuda::GridBarrier barrier{counter, 0};
  WeightStream<T> stream;
  stream.begin(p.products[0], share_of(0, block, blocks, team), slots, thread);
#pragma unroll 1
  for (int i = 0; i < kNumProducts; ++i) {
    if (i == kOProj) {
      const int number = thread / attention::kUpdateThreads;
      const attention::UpdateTeam heads{thread % attention::kUpdateThreads, 2 + number};
#pragma unroll 1
      for (int item = block * kAttentionTeams + number; item < plan.items; item += blocks * kAttentionTeams) {
        attention::update_item<T, kRows>(p.attn, plan, p.attn_workspace, item, heads, shared + number * plan.shared_bytes);
      }
      barrier.wait(blocks, team);
    }
    if (i == kSteps) {
      run_state(p.products[i], p.state, stream, slots, block, blocks, team, shared);
    } else {
      run_product(p.products[i], p.conv, stream, slots, block, blocks, team, shared);
    }
    if (i + 1 == kNumProducts) break;
    stream.begin(p.products[i + 1], share_of(i + 1, block, blocks, team), slots, thread);
    barrier.wait(blocks, team);
  }
}

struct Shape {
  attention::UpdatePlan plan;
  int shared_bytes;
};

Shape shape_of(const StepParams& p, DType dtype) {
  Shape s{attention::plan_update(p.attn, dtype), 0};
  const int64_t bytes = attention::element_bytes(dtype);
  int64_t most = kStageBytes + int64_t{kAttentionTeams} * s.plan.shared_bytes;
  for (int i = 0; i < kNumProducts; ++i) {
    most = max_of(most,
                  i == kSteps ? state_shared_bytes(p.products[i], p.state, bytes) : product_shared_bytes(p.products[i], bytes));
  }
  s.shared_bytes = static_cast<int>(most);
  return s;
}

template <class T, int kRows>
cudaError_t launch_rows(const StepParams& p, const Shape& s, int32_t* counter, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(s.shared_bytes);
  const int per_sm = static_cast<int>(min_of(kBlocksPerSm, fastlm::cuda::blocks_per_sm<whole<T, kRows>>(kThreads, bytes)));
  if (per_sm < 1) return cudaErrorLaunchOutOfResources;
  const cudaError_t status = cudaMemsetAsync(counter, 0, sizeof(int32_t), stream);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned int>(per_sm * fastlm::cuda::current_device().num_sms));
  return fastlm::cuda::launch_cooperative<whole<T, kRows>>(grid, kThreads, bytes, stream, p, s.plan, counter);
}

template <class T>
cudaError_t launch_typed(const StepParams& p, const Shape& s, int32_t* counter, cudaStream_t stream) {
  if (s.plan.tile_rows == 1) return launch_rows<T, 1>(p, s, counter, stream);
  if (s.plan.tile_rows == 4) return launch_rows<T, 4>(p, s, counter, stream);
  return launch_rows<T, attention::kMaxTileRows>(p, s, counter, stream);
}

}  // namespace

bool whole_applies(const StepParams& p, DType dtype) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return false;
  for (const Product& product : p.products) {
    if (product.hidden != nullptr && product.x != nullptr) return false;  // normalised by a launch of its own
  }
  const Shape s = shape_of(p, dtype);
  return s.plan.items < int64_t{1} << 30 && s.shared_bytes <= fastlm::cuda::current_device().max_shared_bytes;
}

cudaError_t launch_whole(const StepParams& p, int32_t* counter, DType dtype, cudaStream_t stream) {
  const Shape s = shape_of(p, dtype);
  return dtype == DType::kBFloat16 ? launch_typed<bfloat16>(p, s, counter, stream) : launch_typed<float16>(p, s, counter, stream);
}

}  // namespace fastlm::samba_decode_step::cuda
