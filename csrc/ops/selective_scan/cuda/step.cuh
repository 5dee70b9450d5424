// One position of the scan of one channel on the device, in pieces: whatever advances a state by a single position (the update,
// the decoding step) forms it from these, so that the same numbers give the same bits.
//
// States are taken four at a time, a sum of products with C for each four (longer states continue it every 4 or 32 lanes); what
// lanes hold of a channel is added pairwise, neighbours first.
#pragma once

#include "ops/selective_scan/cuda/functions.cuh"

namespace fastlm::selective_scan::cuda {

// A log2(e), the factor of every exponent of a channel: rounded once, as in the scan.
template <class A, class B>
__device__ __forceinline__ A decay_of(B a) {
  return static_cast<A>(kLog2e * static_cast<double>(a));
}

// The step's size from dt with its bias. T: the type dt is stored as.
template <class T>
__device__ __forceinline__ acc_t<T> step_size(acc_t<T> dt, bool with_softplus) {
  return with_softplus ? softplus<sizeof(T) != 2>(dt) : dt;
}

// h = exp2(dt decay) h + in b, for the first `count` of four states; `in` is dt x. Returns sum + c . h, from h not yet rounded to
// the type it is stored as. States there are none of are not touched: their products could be 0 times infinity.
template <class A>
__device__ __forceinline__ A step_states(A (&h)[4], const A (&decay)[4], A dt, A in, const A (&b)[4], const A (&c)[4], A sum,
                                         int count = 4) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    h[i] = fastlm::cuda::multiply_add(power_of_two(dt * decay[i]), h[i], in * b[i]);
    sum = fastlm::cuda::multiply_add(c[i], h[i], sum);
  }
  return sum;
}

// The sum of a channel over kLanes neighbouring lanes, in all of them. All lanes of the warp take part.
template <int kLanes, class A>
__device__ __forceinline__ A sum_lanes(A sum) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(fastlm::cuda::kFullWarp, sum, distance);
  return sum;
}

// Four such sums over four lanes at once, lane i getting that of sums[i]: the same additions, 3 exchanges instead of 8.
template <class A>
__device__ __forceinline__ A sum_lanes_each(const A (&sums)[4], int lane) {
  const bool odd = lane % 2 != 0, high = lane / 2 != 0;
  const A low_pair = (odd ? sums[1] : sums[0]) + __shfl_xor_sync(fastlm::cuda::kFullWarp, odd ? sums[0] : sums[1], 1);
  const A high_pair = (odd ? sums[3] : sums[2]) + __shfl_xor_sync(fastlm::cuda::kFullWarp, odd ? sums[2] : sums[3], 1);
  return (high ? high_pair : low_pair) + __shfl_xor_sync(fastlm::cuda::kFullWarp, high ? low_pair : high_pair, 2);
}

// y = (sum + D x) silu(z), where there is a gate.
template <class A>
__device__ __forceinline__ A step_output(A sum, A skip, A x, bool gated, A z) {
  const A y = fastlm::cuda::multiply_add(skip, x, sum);
  return gated ? y * silu(z) : y;
}

}  // namespace fastlm::selective_scan::cuda
