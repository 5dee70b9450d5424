// The step with a launch for every phase: eleven of them.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/samba_decode_step/cuda/launch.h"
#include "ops/samba_decode_step/cuda/product.cuh"
#include "ops/samba_decode_step/cuda/state.cuh"

namespace fastlm::samba_decode_step::cuda {
namespace {

constexpr int kBlocksPerSm = 3;  // of `multiply`

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    multiply(const __grid_constant__ Product p, const __grid_constant__ causal_conv1d::UpdateParams conv) {
  const BlockTeam team{static_cast<int>(threadIdx.x), 1};
  char* const shared = fastlm::cuda::shared_memory();
  Piece<T>* const slots = reinterpret_cast<Piece<T>*>(shared) + threadIdx.x;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  WeightStream<T> stream;
  stream.begin(p, product_share(block, blocks, team), slots, team.thread);
  run_product(p, conv, stream, slots, block, blocks, team, shared + kStageBytes);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    update_states(const __grid_constant__ Product dt, const __grid_constant__ StateUpdate p) {
  const BlockTeam team{static_cast<int>(threadIdx.x), 1};
  char* const shared = fastlm::cuda::shared_memory();
  Piece<T>* const slots = reinterpret_cast<Piece<T>*>(shared) + threadIdx.x;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  WeightStream<T> stream;
  stream.begin(dt, state_share(block, blocks, team), slots, team.thread);
  run_state(dt, p, stream, slots, block, blocks, team, shared + kStageBytes);
}

// Tokens too wide for shared memory: normalised once, into p.x.
template <class T>
__global__ void __launch_bounds__(kThreads) normalize(const __grid_constant__ Product p) {
  const BlockTeam team{static_cast<int>(threadIdx.x), 1};
  const int token = static_cast<int>(blockIdx.x);
  T* const to = const_cast<T*>(static_cast<const T*>(p.x)) + token * p.x_stride;
  stage_normalized(p, token, 1, to, reinterpret_cast<acc_t<T>*>(fastlm::cuda::shared_memory()), team);
}

template <class T>
cudaError_t launch_product(Product p, const causal_conv1d::UpdateParams& conv, cudaStream_t stream) {
  using fastlm::cuda::launch;
  const int tiles = p.row_tiles * p.splits;
  if (tiles == 0 && p.num_zeroed == 0) return cudaSuccess;
  if (p.hidden != nullptr && p.x != nullptr) {
    const cudaError_t status = launch<normalize<T>>(dim3(static_cast<unsigned int>(p.batch)), kThreads, kNormBytes, stream, p);
    if (status != cudaSuccess) return status;
    p.hidden = nullptr;
  }
  const int bytes = product_shared_bytes(p, sizeof(T));
  // As many blocks as run at once, or fewer with equal shares.
  const auto& device = fastlm::cuda::current_device();
  const int64_t at_once = device.num_sms * max_of(1, min_of(kBlocksPerSm, device.max_shared_bytes / (bytes + 1024)));
  const int64_t share = max_of(1, ceil_div(tiles, at_once)), blocks = max_of(1, ceil_div(tiles, share));
  return launch<multiply<T>>(dim3(static_cast<unsigned int>(blocks)), kThreads, static_cast<size_t>(bytes), stream, p, conv);
}

template <class T>
cudaError_t launch_state(const Product& dt, const StateUpdate& p, cudaStream_t stream) {
  if (dt.row_tiles == 0) return cudaSuccess;
  const int64_t blocks = min_of(dt.row_tiles, 2 * fastlm::cuda::current_device().num_sms);
  return fastlm::cuda::launch<update_states<T>>(dim3(static_cast<unsigned int>(blocks)), kThreads,
                                                static_cast<size_t>(state_shared_bytes(dt, p, sizeof(T))), stream, dt, p);
}

template <class T>
cudaError_t launch_all(const StepParams& p, cudaStream_t stream) {
  for (int i = 0; i < kNumProducts; ++i) {
    cudaError_t status = cudaSuccess;
    if (i == kOProj) {
      status = sliding_window_attention::cuda::launch_update(p.attn, p.attn_workspace, DTypeOf<T>::value, stream);
      if (status != cudaSuccess) return status;
    }
    status = i == kSteps ? launch_state<T>(p.products[i], p.state, stream) : launch_product<T>(p.products[i], p.conv, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_phases(const StepParams& p, DType dtype, cudaStream_t stream) {
  if (p.products[kInProj].batch == 0) return cudaSuccess;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() { return launch_all<T>(p, stream); });
}

}  // namespace fastlm::samba_decode_step::cuda
