// What the kernels of the update are started with. Torch-free.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "ops/selective_scan/params.h"

namespace fastlm::selective_scan::cuda {

constexpr int kUpdateThreads = 128;
constexpr int kUpdateRows = 2;                  // that update_kernel has under way
constexpr int kDenseRows = 4, kDenseLanes = 4;  // of update_dense: rows of a block, lanes of a channel
constexpr int kDenseChannels = kUpdateThreads / kDenseLanes;

// update_kernel
struct UpdateCall {
  UpdateParams p;
  int64_t num_slots;  // rows of the state: others are padding
  bool wide_states;   // four neighbouring states are one aligned piece of memory
};

// update_dense: strides in bytes, which fit 32 bits, so that an address is one multiply-add.
struct DenseMatrix {
  char* data;  // null: not given
  uint32_t stride;
};
struct DenseProjection {
  const char* data;
  uint32_t stride, group_stride;
  int32_t group_channels;  // 0: one group
};
struct DenseCall {
  char* state;
  uint32_t slot_stride, channel_stride;
  int32_t batch, dim, num_slots;
  bool dt_softplus;
  const int64_t* slots;  // of the rows, or null
  DenseMatrix x, dt, z, out, A;
  DenseProjection B, C;
  Parameter D, dt_bias;
};

// Whether update_dense can do this, whose arguments are then set.
bool fill_dense(DenseCall& call, const UpdateParams& params, int64_t num_slots, DType dtype);

}  // namespace fastlm::selective_scan::cuda
