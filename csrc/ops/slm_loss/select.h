// Exact choice of the K largest scores of a run of tokens, on keys: unsigned integers in the order of the scores.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastlm::slm_loss {

// Keys of scores: unsigned order is the order of the scores, both zeros are one, and what is not allowed or not finite has key 0,
// which no other score has. float: uint32_t, double: uint64_t.
void keys_of(const float* scores, const bool* allowed, int64_t n, uint32_t* keys);
void keys_of(const double* scores, const bool* allowed, int64_t n, uint64_t* keys);
// The way back; key 0 gives NaN.
float score_of(uint32_t key);
double score_of(uint64_t key);

// How many of n tokens: keep_ratio of them, rounded to nearest, at least one unless keep_ratio or n is 0.
int64_t kept_of(int64_t n, double keep_ratio);

struct Selection {
  int64_t eligible;  // tokens with a key other than 0
  int64_t selected;
  int64_t tied;  // eligible tokens with the smallest selected score
};

// Sets mask[i] for the kept_of(eligible, keep_ratio) largest of n keys. Ties at the threshold: the first in order, or by
// tie_order (keys.h) of the seed and first + i, from the smallest on. `threshold`: the smallest selected key, or the largest Key
// if there is none.
template <class Key>
Selection select_largest(const Key* keys, int64_t n, double keep_ratio, bool random_ties, uint64_t seed, int64_t first,
                         bool* mask, Key* threshold);

}  // namespace fastlm::slm_loss
