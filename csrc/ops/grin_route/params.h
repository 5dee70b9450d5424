// What the kernels of grin_route see: plain pointers and strides (in elements). Letters: T tokens, E experts, k picks per token.
//
// Random numbers. With `noise`, pick j of token t reads noise[t, j, i]: i < E is the Gumbel draw of expert i, i = E the Bernoulli
// draw of the pick. Without it they come from Philox4x32-10 (core/philox.h):
//     key      = seed as 64 bits
//     counter  = (t, j, i / 4, 0)
//     draw     = open_unit(word i % 4)
// so every number has its own place, whatever else is drawn, and a kernel computes only those that can change a result: experts
// that survive the mask beside another one, and the Bernoulli draw of a pick that is not the largest.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastlm::grin_route {

constexpr int64_t kMaxPicks = 8;

// What distinguishes the estimators; without training all are {1, 0, 1, 1}.
struct Estimator {
  double scale;     // p is the masked softmax of scale * z
  double keep_one;  // probability that a pick other than the largest keeps its whole weight
  double reduced;   // factor of the weight otherwise
  double gradient;  // the gradient's factor, with respect to z
};

// "acc" is the accumulation type: float, or double for double.
struct Params {
  int64_t num_tokens, num_experts, top_k;
  const void* logits;  // (T, E)
  int64_t logits_token_stride, logits_expert_stride;
  double threshold;  // 2 * jitter_eps, rounded to acc
  Estimator estimator;
};

struct ForwardParams : Params {
  bool training;
  const void* noise;  // (T, k, E + 1) or null
  DType noise_dtype;
  int64_t noise_token_stride, noise_pick_stride, noise_draw_stride;
  uint64_t seed;
  const bool* valid;  // (T,) or null
  int64_t valid_stride;

  void* weights;    // (T, k) acc
  int32_t* ids;     // (T, k)
  int32_t* counts;  // (E,), zeros; added to
  void* probs;      // (T, k) acc
};

struct BackwardParams : Params {
  const void* dweights;  // (T, k) acc
  int64_t dweights_token_stride, dweights_pick_stride;
  const int32_t* ids;  // (T, k) in [-1, E)
  int64_t ids_token_stride, ids_pick_stride;
  void* dlogits;  // (T, E) contiguous, type of the logits
};

}  // namespace fastlm::grin_route
