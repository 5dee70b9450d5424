// The backward scan on CUDA with two channels a lane, second part: sweeps over a few positions, forward onto a tape in registers
// and back from it.
#pragma once

#include "ops/selective_scan/cuda/backward_paired_tile.cuh"
#include "ops/selective_scan/cuda/backward_sweep.cuh"

namespace fastlm::selective_scan::cuda {

// Four states of two channels, and what is summed for them.
template <class Shape>
struct PairedLane {
  static constexpr int kPer = Shape::kPer, kSub = Shape::kSub, kStates = Shape::kStates;
  using Pair = float[2][kPer];
  const float *steps, *B, *C, *dy;  // of this lane's channels and states
  float *write[2], *read[2];        // this lane's places among the terms of its warp
  float* sums;                      // of this lane
  Pair decay;                       // A log2(e)
  Pair carry;                       // gradients of the states before the position after those at hand: a lambda
  Pair dA;

  __device__ __forceinline__ PairedLane(int lane, int first_pair, char* shared, char* own) {
    const int pair = lane / 4, column = lane % 4 * kPer;
    const auto at = [&](int bytes) { return reinterpret_cast<float*>(shared + bytes); };
    steps = at(Shape::kStepsAt) + (first_pair + pair) * 4;
    B = at(Shape::kB) + column;
    C = at(Shape::kC) + column;
    dy = reinterpret_cast<float*>(own + Shape::kDy) + 2 * pair;
    sums = reinterpret_cast<float*>(own) + 2 * lane;
    // Pairs of odd positions are exchanged by twos: so readers of two positions meet different banks.
    float* const terms = reinterpret_cast<float*>(own + Shape::kTerms);
    const int place = lane * kPer, from = (pair * 8 + pair % 2) * kStates + column;  // `pair` is the position here
    write[0] = terms + place;
    write[1] = terms + (place ^ kStates);
    read[0] = terms + from;
    read[1] = terms + (from ^ kStates);
  }

  // The states before a sub-chunk, and back.
  static __device__ __forceinline__ void load(Pair& h, const float* kept) {
    load_four(h[0], kept);
    load_four(h[1], kept + 32 * kPer);
  }
  static __device__ __forceinline__ void store(float* kept, const Pair& h) {
    store_four(kept, h[0]);
    store_four(kept + 32 * kPer, h[1]);
  }

  // The states at positions 0, 8, ... of a chunk, which begins with h.
  __device__ __forceinline__ void keep_states(int subs, Pair& h, float* kept) const {
    store(kept, h);
    const float *step = steps, *row = B;
#pragma unroll 1
    for (int sub = 1; sub < subs; ++sub) {
#pragma unroll
      for (int j = 0; j < kSub; ++j) {
        float x[4], b[kPer];
        load_four(x, step + j * Shape::kChannels * 2);
        load_four(b, row + j * kStates);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int i = 0; i < kPer; ++i) h[c][i] = fmaf(power_of_two(x[2 * c] * decay[c][i]), h[c][i], x[2 * c + 1] * b[i]);
        }
      }
      step += kSub * Shape::kChannels * 2, row += kSub * kStates, kept += Shape::kKept;
      store(kept, h);
    }
  }

  __device__ __forceinline__ float* term(int j) const { return write[j & 1] + j * 8 * kStates; }
  // Sums over the pairs of the warp: lane l gets four states of position l / 4.
  __device__ __forceinline__ void sum_terms(float (&sum)[4]) const {
    load_four(sum, read[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      float x[4];
      load_four(x, read[i & 1] + i / 2 * 2 * kStates);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += x[k];
    }
  }

  // What a sweep reads of a position: one ahead, since the writes between would hold the reads back.
  struct Step {
    float dt[2], dtu[2], grad[2], b[kPer], c[kPer];
  };
  __device__ __forceinline__ void read_step(int t0, int j, Step& s) const {
    float x[4];
    load_four(x, steps + (t0 + j) * Shape::kChannels * 2);
    s.dt[0] = x[0], s.dtu[0] = x[1], s.dt[1] = x[2], s.dtu[1] = x[3];
    const float2 grad = *reinterpret_cast<const float2*>(dy + j * Shape::kWarpChannels);
    s.grad[0] = grad.x, s.grad[1] = grad.y;
    load_four(s.b, B + (t0 + j) * kStates);
    load_four(s.c, C + (t0 + j) * kStates);
  }
  __device__ __forceinline__ void store_sums(int which, int j, const float (&x)[2]) const {
    *reinterpret_cast<float2*>(sums + which * Shape::kLaneSums + j * 64) = make_float2(x[0], x[1]);
  }

  // What stays of a sweep forward for the one back: a_t and a_t h_{t-1}.
  struct Tape {
    float a[kSub][2][kPer], ah[kSub][2][kPer];
  };

  // From h over a sub-chunk, `t0` its first position in the chunk: y, and the terms of dC.
  __device__ __forceinline__ void forward(int t0, Pair& h, Tape& tape) const {
    Step next;
    read_step(t0, 0, next);
#pragma unroll
    for (int j = 0; j < kSub; ++j) {
      const Step s = next;
      if (j + 1 < kSub) read_step(t0, j + 1, next);
      float y[2], term_c[kPer];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          tape.a[j][c][i] = power_of_two(s.dt[c] * decay[c][i]);
          tape.ah[j][c][i] = tape.a[j][c][i] * h[c][i];
          h[c][i] = fmaf(s.dtu[c], s.b[i], tape.ah[j][c][i]);
          y[c] = i == 0 ? s.c[i] * h[c][i] : fmaf(s.c[i], h[c][i], y[c]);
          term_c[i] = c == 0 ? s.grad[c] * h[c][i] : fmaf(s.grad[c], h[c][i], term_c[i]);
        }
      }
      store_four(term(j), term_c);
      store_sums(0, j, y);
    }
  }

  // And back: sums of lambda B and of lambda decay a h, and the terms of dB.
  __device__ __forceinline__ void back(int t0, const Tape& tape) {
    Step next;
    read_step(t0, kSub - 1, next);
#pragma unroll
    for (int j = kSub - 1; j >= 0; --j) {
      const Step s = next;
      if (j > 0) read_step(t0, j - 1, next);
      float sum_b[2], sum_decay[2], term_b[kPer];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const float lambda = fmaf(s.c[i], s.grad[c], carry[c][i]);
          carry[c][i] = tape.a[j][c][i] * lambda;
          sum_b[c] = i == 0 ? lambda * s.b[i] : fmaf(lambda, s.b[i], sum_b[c]);
          const float w = lambda * tape.ah[j][c][i];
          sum_decay[c] = i == 0 ? decay[c][i] * w : fmaf(decay[c][i], w, sum_decay[c]);
          dA[c][i] = fmaf(s.dt[c], w, dA[c][i]);
          term_b[i] = c == 0 ? lambda * s.dtu[c] : fmaf(lambda, s.dtu[c], term_b[i]);
        }
      }
      store_four(term(j), term_b);
      store_sums(0, j, sum_b);
      store_sums(1, j, sum_decay);
    }
  }
};

}  // namespace fastlm::selective_scan::cuda
