// What the launchers of the sm_90a kernels share: the calls they take, tensor maps of rows of heads, the order of tiles.
#pragma once

#include <algorithm>

#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"
#include "ops/sliding_window_attention/cuda/hopper_params.h"
#include "ops/sliding_window_attention/params.h"

// FASTLM_HOPPER_KERNELS: the build has CUTLASS's headers and compiles for sm_90a (cmake/FastlmCuda.cmake).
#if defined(FASTLM_EMULATE_CUDA)
#define FASTLM_HOPPER_KERNELS
#endif

namespace fastlm::sliding_window_attention::cuda {

// A device of this kind; positions and heads fit the 32-bit coordinates of tile copies, with room for what tiles reach beyond the
// end.
inline bool hopper_takes(const Params& p, DType dtype) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return current_device().major == 9 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && p.head_dim % 8 == 0 &&
         p.head_dim >= 8 && p.head_dim <= 256 && p.device.total_q < kLimit && p.device.total_k < kLimit &&
         p.device.num_sequences < kLimit && p.num_heads < kLimit;
}

// Whether 16 bytes at a time can be read and written.
template <class Rows>
bool vector_rows(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.ptr) % 16 == 0 && rows.batch_stride % 8 == 0 && rows.seq_stride % 8 == 0 &&
         rows.head_stride % 8 == 0;
}

// (batch, positions, heads, K) as boxes of 64 columns of `rows` positions of one head. A dimension of one element never moves:
// its stride may be anything that is allowed, and is that of the dimension inside of it.
template <class Rows>
TensorShape rows_shape(const Params& p, const Rows& t, int64_t heads, int64_t positions, int rows) {
  const int64_t batch = p.device.cu_q == nullptr ? p.device.num_sequences : 1;
  const auto stride = [](int64_t size, int64_t elements, int64_t inner) { return size == 1 ? inner : elements * 2; };
  const int64_t head = stride(heads, t.head_stride, p.head_dim * 2), position = stride(positions, t.seq_stride, head);
  return {
      t.ptr, {p.head_dim, heads, positions, batch}, {head, position, stride(batch, t.batch_stride, position)}, {64, 1, rows, 1}};
}
template <class Rows>
cudaError_t rows_map(TensorMap& map, DType dtype, const Params& p, const Rows& t, int64_t heads, int64_t positions, int rows) {
  return make_tensor_map(map, dtype, rows_shape(p, t, heads, positions, rows));
}

// Tiles of `rows` positions of `positions` (in all, if packed) for each of `heads` heads. `span`: positions on the other side
// that a position meets. Sections hold heads whose keys and values in use at one time fill about half of the second-level cache.
inline TileOrder tile_order(const Params& p, int rows, int64_t positions, int64_t heads, int64_t span) {
  constexpr int64_t kCacheBytes = 24 << 20, kMinTiles = 256;
  const bool packed = p.device.cu_q != nullptr;
  TileOrder o;
  o.slots = packed ? positions / rows + p.device.num_sequences : (positions + rows - 1) / rows;
  o.heads = packed ? heads : heads * p.device.num_sequences;
  const int64_t group = std::max<int64_t>(1, heads / p.num_kv_heads);
  const int64_t bytes = std::min(span + 8 * rows, positions + rows) * p.head_dim * 4;
  const int64_t fitting = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(bytes, 1)) * group;
  const int64_t enough = (kMinTiles + o.slots - 1) / std::max<int64_t>(o.slots, 1);
  o.section = std::max<int64_t>(1, std::min(std::max(fitting, enough), o.heads));
  o.count = o.slots * o.heads;
  return o;
}

}  // namespace fastlm::sliding_window_attention::cuda
