// launch_compact against a loop on the host, on the emulated device: argv[1] is the number of tokens, argv[2] the pattern of
// those that count. Status 1: a wrong list.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "core/cuda/device.cuh"
#include "ops/slm_loss/cuda/compact.h"

namespace {

using fastlm::slm_loss::cuda::CompactParams;

constexpr int64_t kVocab = 50, kIgnore = -100;

uint64_t random_bits() {
  static uint64_t x = 0x9e3779b97f4a7c15u;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

// Whether token t of n is to count, before its label and its gradients are drawn.
bool wanted(const std::string& pattern, int64_t t, int64_t n) {
  if (pattern == "all") return true;
  if (pattern == "none") return false;
  if (pattern == "first") return t == 0;
  if (pattern == "last") return t + 1 == n;
  return random_bits() % 5 < 3;
}

template <class Label, class A>
bool run(int64_t tokens, const std::string& pattern, int gradients, int64_t ignore_index, int64_t tiles) {
  const auto n = static_cast<size_t>(tokens);
  std::vector<Label> labels(n);
  std::vector<std::vector<A>> grads(static_cast<size_t>(gradients), std::vector<A>(n, A(0)));
  std::vector<int32_t> want;
  const Label wrong[] = {static_cast<Label>(ignore_index), -1, kVocab, std::numeric_limits<Label>::max(),
                         std::numeric_limits<Label>::min()};
  for (size_t t = 0; t < n; ++t) {
    const bool counts = wanted(pattern, static_cast<int64_t>(t), tokens);
    const bool by_label = gradients == 0 || random_bits() % 2 == 0;  // what a token that does not count lacks
    do {
      labels[t] = static_cast<Label>(random_bits() % kVocab);
    } while (labels[t] == ignore_index);
    if (!counts && by_label) labels[t] = wrong[random_bits() % 5];
    if (gradients > 0 && (counts || by_label)) {
      const A values[] = {A(1), A(-1), std::numeric_limits<A>::denorm_min(), std::numeric_limits<A>::quiet_NaN()};
      grads[random_bits() % static_cast<size_t>(gradients)][t] = values[random_bits() % 4];
    } else if (gradients > 0) {
      grads[0][t] = A(-0.0);
    }
    if (counts) want.push_back(static_cast<int32_t>(t));
  }
  CompactParams p{};
  p.tokens = tokens;
  p.labels = labels.data();
  p.labels_64 = sizeof(Label) == 8;
  p.ignore_index = ignore_index;
  p.vocab = kVocab;
  for (int i = 0; i < gradients; ++i) p.gradients[2 - i] = grads[static_cast<size_t>(i)].data();
  p.doubles = sizeof(A) == 8;
  std::vector<int32_t> positions(n, -7);
  int32_t count = -7;
  const auto bytes = static_cast<size_t>(fastlm::slm_loss::cuda::compact_workspace_bytes(tokens, tiles));
  std::vector<uint32_t> workspace(bytes / 4, 0xffffffffu);
  p.positions = positions.data();
  p.count = &count;
  p.workspace = workspace.data();
  fastlm::slm_loss::cuda::launch_compact(p, nullptr, tiles);
  if (count != static_cast<int32_t>(want.size())) return false;
  want.resize(n, -7);  // nothing is written after them
  return positions == want;
}

}  // namespace

int main(int, char** arguments) {
  const int64_t tokens = std::atoll(arguments[1]);
  const std::string pattern = arguments[2];
  const int64_t tiles = std::atoll(arguments[3]);
  for (int gradients = 0; gradients <= 3; ++gradients) {
    if (!run<int64_t, float>(tokens, pattern, gradients, kIgnore, tiles) ||
        !run<int32_t, double>(tokens, pattern, gradients, 7, tiles)) {
      std::fprintf(stderr, "wrong list: %d gradients\n", gradients);
      return 1;
    }
  }
  return 0;
}
