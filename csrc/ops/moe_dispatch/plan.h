// Which rows belong together: the stable order of picks by expert, and groups of rows as the CPU kernels take them.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/moe_dispatch/params.h"

namespace fastlm::moe_dispatch {

// Counting sort of `slots` ids in [-1, experts): offsets (experts + 1), perm (row -> slot), inv (slot -> row). Slots of one
// expert keep their order; those of -1 come behind all experts.
void plan_slots(const int32_t* ids, int64_t slots, int64_t experts, int32_t* offsets, int32_t* perm, int32_t* inv);

struct Plan {
  std::vector<int32_t> offsets, perm, inv;
  std::vector<int64_t> tokens;  // row -> token, for rows of experts

  Plan(const int32_t* ids, int64_t slots, int64_t experts, int64_t top_k);
  int64_t rows() const { return offsets.back(); }
};

// Rows of several experts and where they lie in packed buffers.
struct Wave {
  std::vector<Group> groups;
  int64_t packed_rows = 0;

  // Appends rows [begin, end) of an expert. `tile`: rows of a whole tile; groups of up to `small` rows are not packed.
  void add(int64_t expert, int64_t begin, int64_t end, int64_t tile, int64_t small);
  Groups view(int64_t threads) const { return {groups.data(), static_cast<int64_t>(groups.size()), threads}; }
  int64_t count() const { return static_cast<int64_t>(groups.size()); }
  // Blocks of kBlock packed rows.
  int64_t blocks() const;
  bool has_small() const;
};

}  // namespace fastlm::moe_dispatch
