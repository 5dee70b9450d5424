// The decoding step of the scan for N = 16 and contiguous states, whose traffic bounds it: 64 bytes of fp32 read and written for
// a channel of a row. The bits are those of update.cuh.
//
// Four lanes hold the states of a channel, so that a warp moves whole runs of 512 bytes. A thread has its piece of four rows of
// the batch: it asks for all it needs of them before it waits for any of it, and loads A once. What belongs to a channel of a
// row as a whole (the step's size, the gate, the output) is the work of one lane for each row, handed around by exchanges.
#pragma once

#include <type_traits>

#include "ops/selective_scan/cuda/step.cuh"
#include "ops/selective_scan/cuda/update_call.h"

namespace fastlm::selective_scan::cuda {

// Four elements as they lie in memory.
template <class T>
struct Four {
  uint32_t word[sizeof(T)];
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  using Vector = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (uint32_t& w : word) w = 0;
  }
  __device__ __forceinline__ void put(const Vector& v) {
    word[0] = v.x, word[1] = v.y;
    if constexpr (sizeof(T) == 4) word[2] = v.z, word[3] = v.w;
  }
  __device__ __forceinline__ void load(const T* p) { put(__ldg(reinterpret_cast<const Vector*>(p))); }
  // Memory that this thread writes afterwards.
  __device__ __forceinline__ void load_state(const T* p) { put(*reinterpret_cast<const Vector*>(p)); }
  __device__ __forceinline__ void get(float (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        to[i] = __uint_as_float(word[i]);
      } else {
        to[i] = fastlm::cuda::to_acc(T{static_cast<uint16_t>(i % 2 == 0 ? word[i / 2] : word[i / 2] >> 16)});
      }
    }
  }
  static __device__ __forceinline__ void store(T* p, const float (&x)[4]) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(p) =
          uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
    } else {
      *reinterpret_cast<uint2*>(p) = uint2{fastlm::cuda::pack_pair<T>(x[0], x[1]), fastlm::cuda::pack_pair<T>(x[2], x[3])};
    }
  }
};

template <class T>
__device__ __forceinline__ T* at(const char* data, int32_t i, uint32_t stride) {  // i >= 0
  return reinterpret_cast<T*>(const_cast<char*>(data) + static_cast<uint64_t>(static_cast<uint32_t>(i)) * stride);
}

// Four lanes' worth of a row of B or C: where those of row 0 lie.
template <class T>
__device__ __forceinline__ const char* projection_of(const DenseProjection& m, int32_t channel, int lane) {
  const char* const from = m.data + 4 * lane * static_cast<int>(sizeof(T));
  return m.group_channels == 0 ? from : at<const char>(from, channel / m.group_channels, m.group_stride);
}

// T: the call's elements, S: the state's. Grid: x: blocks of channels, y: blocks of rows. Threads whose row or channel does not
// exist read those of the last that does, except from the state, and write nothing.
template <class T, class S>
__global__ void __launch_bounds__(kUpdateThreads, 6) update_dense(const __grid_constant__ DenseCall p) {
  constexpr int kLanes = kDenseLanes, kRows = kDenseRows;
  static_assert(kLanes == 4 && kRows == kLanes, "each lane has a row of its own");
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int32_t d = static_cast<int32_t>(blockIdx.x) * kDenseChannels + thread / kLanes;
  const int32_t channel = min(d, p.dim - 1);
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kRows;
  const int rows = min(p.batch - first, kRows);
  const int32_t row = first + min(lane, rows - 1);  // this lane's own
  const bool own = d < p.dim && lane < rows;

  int32_t own_place = row;
  if (p.slots != nullptr) {
    const int64_t slot = __ldg(p.slots + row);
    own_place = slot >= 0 && slot < p.num_slots ? static_cast<int32_t>(slot) : -1;
  }
  if (!own) own_place = -1;
  int32_t place[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) place[r] = __shfl_sync(fastlm::cuda::kFullWarp, own_place, r, kLanes);

  const char* const states = at<const char>(p.state, channel, p.channel_stride) + 4 * lane * static_cast<int>(sizeof(S));
  Four<S> h[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    h[r].clear();
    if (place[r] >= 0) h[r].load_state(at<const S>(states, place[r], p.slot_stride));
  }
  const auto element = [&](const DenseMatrix& m) { return at<T>(m.data, row, m.stride) + channel; };
  const T x_own = *element(p.x), dt_own = *element(p.dt);
  const bool gated = p.z.data != nullptr;
  T z_own{};
  if (gated) z_own = *element(p.z);
  const char* const b_rows = projection_of<T>(p.B, channel, lane);
  const char* const c_rows = projection_of<T>(p.C, channel, lane);
  Four<T> b[kRows], c[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t from = first + min(r, rows - 1);
    b[r].load(at<const T>(b_rows, from, p.B.stride));
    c[r].load(at<const T>(c_rows, from, p.C.stride));
  }
  Four<float> a;
  a.load(at<const float>(p.A.data, channel, p.A.stride) + 4 * lane);
  // Last: where their type is not fp32, they are waited for as they come.
  const float bias = fastlm::cuda::load_param<float>(p.dt_bias.data, p.dt_bias.dtype, channel * p.dt_bias.dim_stride);
  const float skip = fastlm::cuda::load_param<float>(p.D.data, p.D.dtype, channel * p.D.dim_stride);

  const float x = fastlm::cuda::to_acc(x_own);
  const float dt = step_size<T>(fastlm::cuda::to_acc(dt_own) + bias, p.dt_softplus);
  const float in = dt * x;
  float decay[4];
  a.get(decay);
#pragma unroll
  for (float& factor : decay) factor = decay_of<float>(factor);
  float sums[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const float dt_row = __shfl_sync(fastlm::cuda::kFullWarp, dt, r, kLanes);
    const float in_row = __shfl_sync(fastlm::cuda::kFullWarp, in, r, kLanes);
    float h_row[4], b_row[4], c_row[4];
    h[r].get(h_row);
    b[r].get(b_row);
    c[r].get(c_row);
    sums[r] = step_states(h_row, decay, dt_row, in_row, b_row, c_row, 0.0f);
    if (place[r] >= 0) Four<S>::store(at<S>(states, place[r], p.slot_stride), h_row);
  }
  const float sum = sum_lanes_each(sums, lane);
  if (!own) return;
  const float y = own_place >= 0 ? step_output(sum, skip, x, gated, fastlm::cuda::to_acc(z_own)) : 0.0f;
  *element(p.out) = fastlm::cuda::from_acc<T>(y);
}

}  // namespace fastlm::selective_scan::cuda
