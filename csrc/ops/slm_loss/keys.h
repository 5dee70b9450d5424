// Keys of scores and the order of ties: what the choice of tokens is made of, the same on the CPU and in CUDA kernels. Plain C++
// with internal linkage.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace fastlm::slm_loss {

// Digits of the radix select, from the top.
constexpr int kDigitBits = 11;

template <class Key>
constexpr Key kSign = Key(1) << (sizeof(Key) * 8 - 1);

// No branches: which scores are negative or left out nobody can predict, and so the loop runs in vectors.
template <class Key, class Score>
static constexpr Key to_key(Score score, bool allowed) {
  const Key bits = std::bit_cast<Key>(score + Score(0));  // -0 + 0 is +0
  constexpr Key infinite = std::bit_cast<Key>(std::numeric_limits<Score>::infinity());
  const Key negative = Key(0) - (bits >> (sizeof(Key) * 8 - 1));  // all ones or 0
  const Key kept = Key(0) - static_cast<Key>(allowed && (bits & ~kSign<Key>) < infinite);
  return (bits ^ (negative | kSign<Key>)) & kept;
}

template <class Score, class Key>
static constexpr Score to_score(Key key) {
  if (key == 0) return std::numeric_limits<Score>::quiet_NaN();
  return std::bit_cast<Score>((key & kSign<Key>) != 0 ? key & ~kSign<Key> : ~key);
}

// Place of token `index` among equals in random order, `mixed` being mix_bits(seed): a permutation of the 64-bit integers that
// the seed chooses, so no two tokens have the same. Two rounds of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
static constexpr uint64_t mix_bits(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
static constexpr uint64_t tie_order(uint64_t mixed, uint64_t index) { return mix_bits(mixed + index); }

}  // namespace fastlm::slm_loss
