// Philox4x32-10: random words as a pure function of a key and a counter, the same on every device and for any order of
// evaluation. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Plain C++ with internal
// linkage, for CPU levels and CUDA kernels alike; core/simd/philox.h has it for vectors.
#pragma once

#include <cstdint>

namespace fastlm {

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int kPhiloxRounds = 10;

// Four words for this counter.
static constexpr Philox4 philox(Philox4 counter, uint64_t key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(kPhiloxMultiplier[0]) * c0;
    const uint64_t second = static_cast<uint64_t>(kPhiloxMultiplier[1]) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  return {{c0, c1, c2, c3}};
}

// A word as a number in the open interval (0, 1): an odd multiple of 2^-24, exact in fp32, never 0 or 1.
static constexpr float open_unit(uint32_t word) { return static_cast<float>(2 * (word >> 9) + 1) * 0x1p-24f; }

}  // namespace fastlm
