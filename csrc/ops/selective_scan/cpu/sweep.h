// The two sweeps of the backward pass over one tile, for one vector of channels and kStateGroup states: forward again from the
// chunk's first state, decays and states to a tape; then back along the tape with the gradient of the state in registers.
#pragma once

#include "core/simd/lane_sums.h"
#include "ops/selective_scan/cpu/exponential.h"
#include "ops/selective_scan/cpu/tile.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

// The tiles of a strip, one behind the other, so that a sweep reaches all of them from one pointer.
enum Tile : int64_t {
  kStep,      // dt; raw delta before
  kInput,     // u
  kStepIn,    // dt * u
  kGrad,      // dy; raw dout before
  kSlope,     // derivative of dt by delta
  kGateGrad,  // dout * d silu(z)/dz; raw z before
  kSumB,      // sum over states of lambda B; du in the end
  kSumDecay,  // sum over states of lambda a_t h_{t-1} decay; ddelta in the end
  kOutput,    // sum over states of C h; dz in the end
  kNumTiles,
};
template <class A>
constexpr int64_t kTile = kStrip / lanes_of<A> * kPitch<A>;

// Vectors per position on the tape: a_t and h_{t-1} of each state. h_t is found one position further.
constexpr int64_t kTapeRow = 2 * kStateGroup;

// dB of the states of a group, then dC, summed over channels.
constexpr int64_t kSumsRow = 2 * kStateGroup;

template <class A>
struct Sweep {
  int64_t length, padded_state, sums_stride;
  A* tile;         // the vector's place in the first tile
  const A* decay;  // vectors of channels
  const A *b, *c;  // rows of padded_state values, or, if constant, vectors of channels
  A *db, *dc;      // vectors of channels; if constant only
  A* sums;         // (position, kSumsRow): what is added to dB and dC of the group's states, where those are not constant
  A *h, *carry, *da;
  A* tape;  // (kChunk + 1, kTapeRow) vectors
};

// Pointers are copied to locals first: stores through one of them could change the struct, as far as the compiler knows.
template <class A, bool kInRange, bool kConstantB>
void sweep_forward(const Sweep<A>& s) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  const int64_t length = s.length, padded_state = s.padded_state;
  const A *tile = s.tile, *decay = s.decay, *b = s.b;
  A* tape = s.tape;
  V h[kStateGroup];
  for (int64_t k = 0; k < kStateGroup; ++k) h[k] = load(s.h + k * kLanes);
  for (int64_t t = 0; t < length; ++t) {
    const V step = load(tile + kStep * kTile<A>), step_in = load(tile + kStepIn * kTile<A>);
    for (int64_t k = 0; k < kStateGroup; k += 2) {
      V a[2], in[2];
      for (int i = 0; i < 2; ++i) a[i] = step * load(decay + (k + i) * kLanes);
      exp2_each<kInRange, 2>(a);
      for (int i = 0; i < 2; ++i) {
        in[i] = step_in * (kConstantB ? load(b + (k + i) * kLanes) : broadcast<V>(b[k + i]));
      }
      for (int i = 0; i < 2; ++i) {
        store(tape + (k + i) * kLanes, a[i]);
        store(tape + (kStateGroup + k + i) * kLanes, h[k + i]);
        h[k + i] = fma(a[i], h[k + i], in[i]);
      }
    }
    tile += kLanes;
    tape += kTapeRow * kLanes;
    if (!kConstantB) b += padded_state;
  }
  for (int64_t k = 0; k < kStateGroup; ++k) store(tape + (kStateGroup + k) * kLanes, h[k]);
}

template <class A, bool kConstantB, bool kConstantC, bool kGate>
void sweep_back(const Sweep<A>& s) {
  using V = vec_t<A>;
  constexpr int64_t kLanes = lanes_of<A>;
  const int64_t length = s.length, last = length - 1, padded_state = s.padded_state, sums_stride = s.sums_stride;
  const A* decay = s.decay;
  A* tile = s.tile + last * kLanes;
  const A* tape = s.tape + last * kTapeRow * kLanes;
  const A* b = kConstantB ? s.b : s.b + last * padded_state;
  const A* c = kConstantC ? s.c : s.c + last * padded_state;
  A *db = s.db, *dc = s.dc;
  A* sums = s.sums + last * sums_stride;
  V carry[kStateGroup], da[kStateGroup];
  for (int64_t k = 0; k < kStateGroup; ++k) {
    carry[k] = load(s.carry + k * kLanes);
    da[k] = load(s.da + k * kLanes);
  }
  for (int64_t t = 0; t < length; ++t) {
    const V dy = load(tile + kGrad * kTile<A>), step = load(tile + kStep * kTile<A>), step_in = load(tile + kStepIn * kTile<A>);
    V sum_b = load(tile + kSumB * kTile<A>), sum_decay = load(tile + kSumDecay * kTile<A>);
    V y = kGate ? load(tile + kOutput * kTile<A>) : zero<V>();
    V shares[kSumsRow] = {};
    for (int64_t k = 0; k < kStateGroup; ++k) {
      const V h = load(tape + (kTapeRow + kStateGroup + k) * kLanes);
      const V c_k = kConstantC ? load(c + k * kLanes) : broadcast<V>(c[k]);
      const V lambda = fma(c_k, dy, carry[k]);
      carry[k] = load(tape + k * kLanes) * lambda;
      const V ah = carry[k] * load(tape + (kStateGroup + k) * kLanes);  // lambda a_t h_{t-1}
      da[k] = fma(step, ah, da[k]);
      sum_decay = fma(load(decay + k * kLanes), ah, sum_decay);
      sum_b = fma(kConstantB ? load(b + k * kLanes) : broadcast<V>(b[k]), lambda, sum_b);
      if (kGate) y = fma(c_k, h, y);
      if (kConstantB) {
        store(db + k * kLanes, fma(lambda, step_in, load(db + k * kLanes)));
      } else {
        shares[k] = lambda * step_in;
      }
      if (kConstantC) {
        store(dc + k * kLanes, fma(dy, h, load(dc + k * kLanes)));
      } else {
        shares[kStateGroup + k] = dy * h;
      }
    }
    if (!kConstantB || !kConstantC) add_lane_sums(shares, sums);
    store(tile + kSumB * kTile<A>, sum_b);
    store(tile + kSumDecay * kTile<A>, sum_decay);
    if (kGate) store(tile + kOutput * kTile<A>, y);
    tile -= kLanes;
    tape -= kTapeRow * kLanes;
    sums -= sums_stride;
    if (!kConstantB) b -= padded_state;
    if (!kConstantC) c -= padded_state;
  }
  for (int64_t k = 0; k < kStateGroup; ++k) {
    store(s.carry + k * kLanes, carry[k]);
    store(s.da + k * kLanes, da[k]);
  }
}

template <class A>
using SweepFunction = void (*)(const Sweep<A>&);

template <class A>
SweepFunction<A> choose_forward(bool in_range, bool constant_b) {
  static constexpr SweepFunction<A> kTable[4] = {sweep_forward<A, false, false>, sweep_forward<A, false, true>,
                                                 sweep_forward<A, true, false>, sweep_forward<A, true, true>};
  return kTable[2 * in_range + constant_b];
}

template <class A>
SweepFunction<A> choose_back(bool constant_b, bool constant_c, bool gate) {
  static constexpr SweepFunction<A> kTable[8] = {sweep_back<A, false, false, false>, sweep_back<A, false, false, true>,
                                                 sweep_back<A, false, true, false>,  sweep_back<A, false, true, true>,
                                                 sweep_back<A, true, false, false>,  sweep_back<A, true, false, true>,
                                                 sweep_back<A, true, true, false>,   sweep_back<A, true, true, true>};
  return kTable[4 * constant_b + 2 * constant_c + gate];
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
