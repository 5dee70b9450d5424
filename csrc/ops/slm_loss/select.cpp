// Radix select on order-preserving keys: histograms of 11 bits from the top, each over those keys only that share the digits
// found so far. Three passes for float; bound by one read of the keys a pass.
#include "ops/slm_loss/select.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/slm_loss/keys.h"

namespace fastlm::slm_loss {
namespace {

constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// The k-th largest of n keys, 1 <= k <= n, and in `above` how many are larger.
template <class Key>
Key kth_largest(const Key* keys, int64_t n, int64_t k, int64_t* above) {
  constexpr int kBits = sizeof(Key) * 8;
  std::vector<int64_t> counts(kDigits);
  Key found = 0;
  int64_t larger = 0;
  for (int top = kBits; top > 0;) {
    const int shift = std::max(top - kDigitBits, 0);
    const Key digit_mask = (Key(1) << (top - shift)) - 1;
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      // Two steps: a shift by the width of the type is undefined.
      if ((keys[i] ^ found) >> (top - 1) >> 1 == 0) ++counts[static_cast<size_t>((keys[i] >> shift) & digit_mask)];
    }
    auto digit = static_cast<int64_t>(digit_mask);
    while (larger + counts[static_cast<size_t>(digit)] < k) larger += counts[static_cast<size_t>(digit--)];
    found |= static_cast<Key>(digit) << shift;
    top = shift;
  }
  *above = larger;
  return found;
}

}  // namespace

void keys_of(const float* scores, const bool* allowed, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = to_key<uint32_t>(scores[i], allowed[i]);
}
void keys_of(const double* scores, const bool* allowed, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = to_key<uint64_t>(scores[i], allowed[i]);
}
float score_of(uint32_t key) { return to_score<float>(key); }
double score_of(uint64_t key) { return to_score<double>(key); }

int64_t kept_of(int64_t n, double keep_ratio) {
  if (n == 0 || keep_ratio == 0) return 0;
  return std::clamp(static_cast<int64_t>(std::floor(keep_ratio * static_cast<double>(n) + 0.5)), int64_t{1}, n);
}

template <class Key>
Selection select_largest(const Key* keys, int64_t n, double keep_ratio, bool random_ties, uint64_t seed, int64_t first,
                         bool* mask, Key* threshold) {
  Selection done{};
  for (int64_t i = 0; i < n; ++i) done.eligible += keys[i] != 0;
  done.selected = kept_of(done.eligible, keep_ratio);
  *threshold = std::numeric_limits<Key>::max();
  if (done.selected == 0) {
    std::fill(mask, mask + n, false);
    return done;
  }
  int64_t above = 0;
  const Key least = kth_largest(keys, n, done.selected, &above);
  *threshold = least;
  for (int64_t i = 0; i < n; ++i) done.tied += keys[i] == least;
  int64_t wanted = done.selected - above;
  if (wanted == done.tied) {  // the usual case: nobody at the threshold is left out
    for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] >= least;
    return done;
  }
  if (!random_ties) {
    for (int64_t i = 0; i < n; ++i) {
      const bool taken = keys[i] > least || (keys[i] == least && wanted > 0);
      wanted -= taken && keys[i] == least;
      mask[i] = taken;
    }
    return done;
  }
  const uint64_t mixed = mix_bits(seed);
  std::vector<uint64_t> order;
  order.reserve(static_cast<size_t>(done.tied));
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] == least) order.push_back(tie_order(mixed, static_cast<uint64_t>(first + i)));
  }
  std::vector<uint64_t> sorted = order;
  std::nth_element(sorted.begin(), sorted.begin() + (wanted - 1), sorted.end());
  const uint64_t last = sorted[static_cast<size_t>(wanted - 1)];
  size_t tie = 0;
  for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] > least || (keys[i] == least && order[tie++] <= last);
  return done;
}

template Selection select_largest(const uint32_t*, int64_t, double, bool, uint64_t, int64_t, bool*, uint32_t*);
template Selection select_largest(const uint64_t*, int64_t, double, bool, uint64_t, int64_t, bool*, uint64_t*);

}  // namespace fastlm::slm_loss
