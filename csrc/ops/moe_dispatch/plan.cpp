// The order of picks by expert.
#include "ops/moe_dispatch/plan.h"

#include <algorithm>
#include <utility>

#include "core/integers.h"

namespace fastlm::moe_dispatch {

void plan_slots(const int32_t* ids, int64_t slots, int64_t experts, int32_t* offsets, int32_t* perm, int32_t* inv) {
  std::vector<int32_t> next(static_cast<size_t>(experts) + 1);  // next row of each expert; the last one for -1
  const auto place = [&](int32_t id) { return static_cast<size_t>(id < 0 ? experts : id); };
  for (int64_t s = 0; s < slots; ++s) ++next[place(ids[s])];
  int32_t row = 0;
  for (size_t e = 0; e < next.size(); ++e) {
    offsets[e] = row;
    row += std::exchange(next[e], row);
  }
  for (int64_t s = 0; s < slots; ++s) {
    const int32_t at = next[place(ids[s])]++;
    perm[at] = static_cast<int32_t>(s);
    inv[s] = at;
  }
}

Plan::Plan(const int32_t* ids, int64_t slots, int64_t experts, int64_t top_k)
    : offsets(static_cast<size_t>(experts) + 1), perm(static_cast<size_t>(slots)), inv(static_cast<size_t>(slots)) {
  plan_slots(ids, slots, experts, offsets.data(), perm.data(), inv.data());
  tokens.resize(static_cast<size_t>(rows()));
  for (size_t r = 0; r < tokens.size(); ++r) tokens[r] = perm[r] / top_k;
}

void Wave::add(int64_t expert, int64_t begin, int64_t end, int64_t tile, int64_t small) {
  const bool is_small = end - begin <= small && end > begin;
  const int64_t padded = is_small ? 0 : ceil_div(end - begin, tile) * tile;
  groups.push_back({expert, begin, end, packed_rows, padded, begin, is_small});
  packed_rows += padded;
}

int64_t Wave::blocks() const {
  int64_t count = 0;
  for (const Group& group : groups) count += ceil_div(group.padded, kBlock);
  return count;
}

bool Wave::has_small() const {
  return std::any_of(groups.begin(), groups.end(), [](const Group& group) { return group.small; });
}

}  // namespace fastlm::moe_dispatch
