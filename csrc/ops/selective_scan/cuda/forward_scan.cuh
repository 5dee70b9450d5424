// The forward scan on CUDA, second part: the recurrence over a prepared tile, states in registers.
#pragma once

#include "ops/selective_scan/cuda/forward_stage.cuh"
#include "ops/selective_scan/cuda/functions.cuh"

namespace fastlm::selective_scan::cuda {

// Sums over the lanes of a channel (kStride threads apart) of four values, one for each of four steps; lane l gets the one of
// step l % 4.
template <int kLanes, int kStride, class A>
__device__ __forceinline__ A sum_over_lanes(const A (&y)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const A first = (odd ? y[1] : y[0]) + __shfl_xor_sync(kFullWarp, odd ? y[0] : y[1], kStride);
  const A second = (odd ? y[3] : y[2]) + __shfl_xor_sync(kFullWarp, odd ? y[2] : y[3], kStride);
  A sum = (high ? second : first) + __shfl_xor_sync(kFullWarp, high ? first : second, 2 * kStride);
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance * kStride);
  return sum;
}

// How many of a lane's states get their exponentials from multiply-adds instead of the special-function unit. The same ones at
// every position: the bits of a sequence must not depend on where it is cut. 0: by instruction count both units are busy as it
// is.
constexpr int kFmaStates = 0;

__device__ __forceinline__ float decay_of(float x, int state) {
  return state < kFmaStates ? power_of_two_fma(x) : power_of_two(x);
}
__device__ __forceinline__ double decay_of(double x, int) { return power_of_two(x); }

template <int kPer, class A>
__device__ __forceinline__ void load_states(A (&to)[kPer], const A* from) {
#pragma unroll
  for (int i = 0; i < kPer; i += 16 / static_cast<int>(sizeof(A))) {
    if constexpr (sizeof(A) == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    } else {
      const double2 x = *reinterpret_cast<const double2*>(from + i);
      to[i] = x.x, to[i + 1] = x.y;
    }
  }
}

// Scans the prepared tile: y (sums over the states) of each position, h afterwards. kPlain: B and C per position, no states kept.
template <class Shape, bool kPlain, bool kEnds>
__device__ __forceinline__ void scan_tile(const ForwardCall& call, const Stretch& s, int64_t t0, int steps, int channel, int lane,
                                          const typename Shape::A (&decay)[Shape::kPer], const typename Shape::A* pairs,
                                          const typename Shape::A* B, const typename Shape::A* C, typename Shape::A* sums,
                                          typename Shape::A (&h)[Shape::kPer]) {
  using A = typename Shape::A;
  constexpr int kPer = Shape::kPer;
  const ForwardParams& p = call.p;
  A b_constant[kPer], c_constant[kPer];
  if constexpr (!kPlain) {
    const auto constant = [&](const Projection& m, A(&to)[kPer]) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int64_t n = lane * kPer + i;
        const bool there = m.constant && channel < s.channels && n < p.state;
        to[i] = there ? fastlm::cuda::load_param<A>(m.data, m.dtype, (s.channel + channel) * m.dim_stride + n * m.state_stride)
                      : A(0);
      }
    };
    constant(p.B, b_constant);
    constant(p.C, c_constant);
  }
  const A* pair = pairs + channel * 2;
  const A* b_row = B + lane * kPer;
  const A* c_row = C + lane * kPer;
  for (int t4 = 0; t4 < steps; t4 += 4) {
    A y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = t4 + j;
      const A dt = pair[t * Shape::kChannels * 2], dtu = pair[t * Shape::kChannels * 2 + 1];
      A b[kPer], c[kPer];
      load_states<kPer>(b, b_row + t * Shape::kStates);
      if constexpr (!kEnds) load_states<kPer>(c, c_row + t * Shape::kStates);
      if constexpr (!kPlain) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (p.B.constant) b[i] = b_constant[i];
          if (p.C.constant) c[i] = c_constant[i];
        }
      }
      y[j] = A(0);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const A a = decay_of(dt * decay[i], i);
        h[i] = fastlm::cuda::multiply_add(a, h[i], dtu * b[i]);
        if constexpr (!kEnds) y[j] = fastlm::cuda::multiply_add(c[i], h[i], y[j]);
      }
      if constexpr (!kPlain && !kEnds) {
        if (p.all_states != nullptr && t < steps && channel < s.channels) {
          A* all =
              static_cast<A*>(p.all_states) + ((s.sequence.batch * p.seqlen + t0 + t) * p.dim + s.channel + channel) * p.state;
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            if (lane * kPer + i < p.state) all[lane * kPer + i] = h[i];
          }
        }
      }
    }
    if constexpr (!kEnds) {
      const A sum = sum_over_lanes<Shape::kLanes, Shape::kLaneStride>(y, lane);
      if (lane < 4) sums[(t4 + lane) * Shape::kSumStride + channel] = sum;
    }
  }
}

// The same for B and C per position, ordered so that nothing waits: steps are read two groups of four positions ahead,
// exponentials and inputs formed one group ahead, and the recurrence and its sums take what is there. Pointers are those of this
// lane at the first position of a group.
template <class Shape>
struct ScanAhead {
  using A = typename Shape::A;
  static constexpr int kPer = Shape::kPer;
  static constexpr int kPairGroup = 4 * Shape::kChannels * 2, kStateGroup = 4 * Shape::kStates, kSumGroup = 4 * Shape::kSumStride;
  const A (&decay)[kPer];
  A dt[4], dtu[4], a[4][kPer], input[4][kPer];

  __device__ __forceinline__ void read_steps(const A* pair) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      dt[j] = pair[j * Shape::kChannels * 2];
      dtu[j] = pair[j * Shape::kChannels * 2 + 1];
    }
  }
  __device__ __forceinline__ void form(const A* b_row, A (&a_to)[4][kPer], A (&input_to)[4][kPer]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      A b[kPer];
      load_states<kPer>(b, b_row + j * Shape::kStates);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        a_to[j][i] = decay_of(dt[j] * decay[i], i);
        input_to[j][i] = dtu[j] * b[i];
      }
    }
  }
  // What comes before the first group: its inputs and the steps of the second.
  __device__ __forceinline__ void begin(const A* pair, const A* b_row) {
    read_steps(pair);
    form(b_row, a, input);
    read_steps(pair + kPairGroup % (Shape::kSteps * Shape::kChannels * 2));
  }
  // A group; forms the next one, whose B is at b_next, and reads the steps of the one after that.
  template <bool kMore>
  __device__ __forceinline__ A advance(const A* c_row, const A* b_next, const A* pair_after, int lane, A (&h)[kPer]) {
    A c[4][kPer], a_next[4][kPer], input_next[4][kPer], y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) load_states<kPer>(c[j], c_row + j * Shape::kStates);
    if constexpr (kMore) {
      form(b_next, a_next, input_next);
      read_steps(pair_after);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[j] = A(0);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        h[i] = fastlm::cuda::multiply_add(a[j][i], h[i], input[j][i]);
        y[j] = fastlm::cuda::multiply_add(c[j][i], h[i], y[j]);
      }
    }
    if constexpr (kMore) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          a[j][i] = a_next[j][i];
          input[j][i] = input_next[j][i];
        }
      }
    }
    return sum_over_lanes<Shape::kLanes, Shape::kLaneStride>(y, lane);
  }
};

template <class Shape>
__device__ __forceinline__ void scan_tile_ahead(int steps, int channel, int lane, const typename Shape::A (&decay)[Shape::kPer],
                                                const typename Shape::A* pairs, const typename Shape::A* B,
                                                const typename Shape::A* C, typename Shape::A* sums,
                                                typename Shape::A (&h)[Shape::kPer]) {
  using Scan = ScanAhead<Shape>;
  const typename Shape::A *pair = pairs + channel * 2, *b_row = B + lane * Shape::kPer, *c_row = C + lane * Shape::kPer;
  Scan scan{decay, {}, {}, {}, {}};
  scan.begin(pair, b_row);
  int t4 = 0;
#pragma unroll 1
  for (; t4 + 4 < steps; t4 += 4) {
    const int after = (t4 + 8) % Shape::kSteps;  // past the tile: its first ones, which nobody takes
    const auto sum = scan.template advance<true>(c_row + t4 * Shape::kStates, b_row + (t4 + 4) * Shape::kStates,
                                                 pair + after * Shape::kChannels * 2, lane, h);
    if (lane < 4) sums[(t4 + lane) * Shape::kSumStride + channel] = sum;
  }
  const auto sum = scan.template advance<false>(c_row + t4 * Shape::kStates, b_row, pair, lane, h);
  if (lane < 4) sums[(t4 + lane) * Shape::kSumStride + channel] = sum;
}

}  // namespace fastlm::selective_scan::cuda
