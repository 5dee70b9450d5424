// What the forward kernels on CUDA need beyond the parameters: how tensors lie in memory, and how time is split.
#pragma once

#include "core/integers.h"
#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan::cuda {

// Which of a tensor's two dimensions, positions and columns (channels or states), is contiguous.
enum class Order : int { kRows, kColumns, kScattered };  // columns are; positions are; neither (copied as kRows)

inline Order order_of(int64_t column_stride, int64_t step_stride) {
  return column_stride == 1 ? Order::kRows : step_stride == 1 ? Order::kColumns : Order::kScattered;
}

struct Orders {
  Order u, delta, z, B, C, out;
};

// Parts of sequences that are scanned side by side. Each has a slot of its own: slots of a sequence follow each other.
struct Split {
  int64_t part;   // positions of a part, a multiple of kChunk; 0: a sequence is one part, its number the slot
  int64_t slots;  // no slot is larger; some stay empty
  // (slots, N, D), accumulation type. Null where time is not split.
  const void* begin_states;  // before each part
  void* end_states;          // after each part if its first state were 0
  void* decays;              // product of the decays of a part
};

struct ForwardCall {
  ForwardParams p;
  Orders order;
  Split split;
  bool ends_only;  // the pass that finds end_states and decays
};

}  // namespace fastlm::selective_scan::cuda
