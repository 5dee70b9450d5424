// One position of the scan per row on CUDA, from and into the state: h = exp2(dt A log2 e) h + dt x B, y = C . h + D x, gated by
// z. Arithmetic as in forward.cuh. Any N, strides and types; what most calls are goes through update_dense.cuh, to the same bits.
// Four lanes (32 where N is large) hold a channel's states, four neighbouring ones each; kUpdateRows rows of the batch are under
// way in a thread at once, and share its A. Bound by latency: what a row needs is asked for one thing after another.
#pragma once

#include "ops/selective_scan/cuda/step.cuh"
#include "ops/selective_scan/cuda/update_call.h"

namespace fastlm::selective_scan::cuda {

template <class A>
__device__ __forceinline__ void load_state(A (&h)[4], const void* state, DType dtype, int64_t at, int64_t stride, bool wide,
                                           int count) {
  if (wide && count >= 4) {
    if (dtype == DType::kFloat32) {
      const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(state) + at);
      h[0] = x.x, h[1] = x.y, h[2] = x.z, h[3] = x.w;
      return;
    }
    if (dtype != DType::kFloat64) {
      const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(state) + at);
      const uint16_t bits[4] = {static_cast<uint16_t>(x.x), static_cast<uint16_t>(x.x >> 16), static_cast<uint16_t>(x.y),
                                static_cast<uint16_t>(x.y >> 16)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[i] = dtype == DType::kBFloat16 ? fastlm::cuda::to_acc(bfloat16{bits[i]}) : fastlm::cuda::to_acc(float16{bits[i]});
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) h[i] = i < count ? fastlm::cuda::load_param<A>(state, dtype, at + i * stride) : A(0);
}

template <class A>
__device__ __forceinline__ uint16_t short_bits(A x, DType dtype) {
  const float y = static_cast<float>(x);
  return dtype == DType::kBFloat16 ? fastlm::cuda::from_acc<bfloat16>(y).bits : fastlm::cuda::from_acc<float16>(y).bits;
}

template <class A>
__device__ __forceinline__ void store_state(const A (&h)[4], void* state, DType dtype, int64_t at, int64_t stride, bool wide,
                                            int count) {
  if (wide && count >= 4) {
    if (dtype == DType::kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(state) + at) =
          make_float4(static_cast<float>(h[0]), static_cast<float>(h[1]), static_cast<float>(h[2]), static_cast<float>(h[3]));
      return;
    }
    if (dtype != DType::kFloat64) {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = short_bits(h[i], dtype);
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(state) + at) =
          make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    const int64_t n = at + i * stride;
    if (dtype == DType::kFloat32) {
      static_cast<float*>(state)[n] = static_cast<float>(h[i]);
    } else if (dtype == DType::kFloat64) {
      static_cast<double*>(state)[n] = static_cast<double>(h[i]);
    } else {
      static_cast<uint16_t*>(state)[n] = short_bits(h[i], dtype);
    }
  }
}

// Grid: x: blocks of channels; y: kUpdateRows rows of the batch, strided.
template <class T, int kLanes>
__global__ void __launch_bounds__(kUpdateThreads, sizeof(acc_t<T>) == 4 ? 6 : 4)
    update_kernel(const __grid_constant__ UpdateCall call) {
  using A = acc_t<T>;
  constexpr int kChannels = kUpdateThreads / kLanes;
  const UpdateParams& p = call.p;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x / kLanes;
  const bool real = d < p.dim;
  const int64_t channel = real ? d : 0;
  const int64_t b_group = p.B.groups == 1 ? 0 : channel / (p.dim / p.B.groups);
  const int64_t c_group = p.C.groups == 1 ? 0 : channel / (p.dim / p.C.groups);
  const A bias = fastlm::cuda::load_param<A>(p.dt_bias.data, p.dt_bias.dtype, channel * p.dt_bias.dim_stride);
  const A skip = fastlm::cuda::load_param<A>(p.D.data, p.D.dtype, channel * p.D.dim_stride);
  const auto element = [&](const Activation& x, int64_t row) {
    return fastlm::cuda::to_acc(static_cast<const T*>(x.data)[row * x.batch_stride + channel * x.dim_stride]);
  };
  const auto load_row = [&](A(&to)[4], const Projection& m, int64_t group, int64_t row, int64_t n0, int count) {
    const T* from = static_cast<const T*>(m.data) + row * m.batch_stride + group * m.group_stride + n0 * m.state_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? fastlm::cuda::to_acc(from[i * m.state_stride]) : A(0);
  };

  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kUpdateRows; first < p.batch;
       first += static_cast<int64_t>(gridDim.y) * kUpdateRows) {
    A dt[kUpdateRows], in[kUpdateRows], sum[kUpdateRows];
    int64_t slot[kUpdateRows];
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) {
      const int64_t row = first + r;
      slot[r] = -1;
      if (row < p.batch) slot[r] = p.state_batch_indices == nullptr ? row : p.state_batch_indices[row];
      if (slot[r] >= call.num_slots || !real) slot[r] = -1;
      sum[r] = dt[r] = in[r] = A(0);
      if (slot[r] < 0) continue;
      dt[r] = step_size<T>(element(p.dt, row) + bias, p.dt_softplus);
      in[r] = dt[r] * element(p.x, row);
    }
    for (int64_t n0 = 4 * lane; n0 < p.state; n0 += 4 * kLanes) {
      const int count = static_cast<int>(p.state - n0 < 4 ? p.state - n0 : 4);
      A h[kUpdateRows][4], decay[4];
      const auto at = [&](int r) {
        return slot[r] * p.state_batch_stride + channel * p.state_dim_stride + n0 * p.state_state_stride;
      };
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        if (slot[r] >= 0) load_state(h[r], p.state_data, p.state_dtype, at(r), p.state_state_stride, call.wide_states, count);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        decay[i] = A(0);
        if (i >= count) continue;
        const int64_t n = channel * p.A.dim_stride + (n0 + i) * p.A.state_stride;
        decay[i] = decay_of<A>(fastlm::cuda::load_param<double>(p.A.data, p.A.dtype, n));
      }
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        if (slot[r] < 0) continue;
        A b[4], c[4];
        load_row(b, p.B, b_group, first + r, n0, count);
        load_row(c, p.C, c_group, first + r, n0, count);
        sum[r] = step_states(h[r], decay, dt[r], in[r], b, c, sum[r], count);
        store_state(h[r], p.state_data, p.state_dtype, at(r), p.state_state_stride, call.wide_states, count);
      }
    }
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) {
      sum[r] = sum_lanes<kLanes>(sum[r]);
      const int64_t row = first + r;
      if (lane != 0 || !real || row >= p.batch) continue;
      A y = A(0);
      if (slot[r] >= 0) {
        const bool gated = p.z.data != nullptr;
        y = step_output(sum[r], skip, element(p.x, row), gated, gated ? element(p.z, row) : A(0));
      }
      static_cast<T*>(p.out.data)[row * p.out.batch_stride + channel * p.out.dim_stride] = fastlm::cuda::from_acc<T>(y);
    }
  }
}

}  // namespace fastlm::selective_scan::cuda
