// How a grid covers (B, D, L), chosen on the host. Blocks are numbered: channels fastest, then pieces of time, then rows of the
// batch; after these tiles come blocks for the states, so that one launch does both.
#pragma once

#include <cstdint>

#include "core/cuda/launch.h"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {

// Rows: a thread has the same channels at many positions (channel-last memory, or any strides). Channels: a thread has
// kSteps positions of one channel, in memory whose positions are adjacent.
constexpr int kRowThreads = 64;
constexpr int kChannelThreads = 128;
constexpr int kSteps = 16;
constexpr int kUnroll = 4;  // positions whose loads are under way together

struct Tiling {
  int64_t steps;              // positions of a thread's piece (rows)
  uint32_t tiles;             // blocks before those for the states
  uint32_t channel_blocks;    // blocks along the channels
  uint32_t pieces;            // blocks along time
  uint32_t threads_per_line;  // channels: threads along one channel's positions, a power of two
  bool vectors;               // channels: positions can be moved 16 bytes at once
  int64_t num_states;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool multiple_of_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool multiple_of_16_bytes(int64_t stride, int64_t size) { return stride * size % 16 == 0; }

// Strides of a dimension of size 1 do not matter.
inline bool rows_are_aligned(const Params& p, int64_t batch_stride, int64_t seq_stride, int64_t size) {
  return (p.batch == 1 || multiple_of_16_bytes(batch_stride, size)) && (p.seqlen == 1 || multiple_of_16_bytes(seq_stride, size));
}

template <class P>
bool weights_are_aligned(const P& p) {
  return multiple_of_16_bytes(p.weight) && p.weight_width_stride == 1 && p.weight_dim_stride == p.width &&
         (p.bias == nullptr || (multiple_of_16_bytes(p.bias) && p.bias_stride == 1));
}

// Whether threads may move `lanes` adjacent channels of x at once: everything they touch is aligned.
inline bool rows_are_aligned(const Params& p, int64_t size, int64_t lanes) {
  return p.x_dim_stride == 1 && p.dim % lanes == 0 && multiple_of_16_bytes(p.x) &&
         rows_are_aligned(p, p.x_batch_stride, p.x_seq_stride, size) && weights_are_aligned(p);
}
inline bool lines_are_aligned(const Params& p, const void* x, int64_t batch_stride, int64_t dim_stride, int64_t size) {
  return multiple_of_16_bytes(x) && (p.batch == 1 || multiple_of_16_bytes(batch_stride, size)) &&
         (p.dim == 1 || multiple_of_16_bytes(dim_stride, size));
}

inline void number_tiles(Tiling& t, const Params& p) {
  const int64_t tiles = p.seqlen > 0 ? p.batch * t.pieces * t.channel_blocks : 0;
  t.tiles = static_cast<uint32_t>(tiles);
  t.num_states = p.device.cu_seqlens != nullptr ? p.device.num_sequences : p.batch;
}

// Rows: `steps` positions to each of `groups` groups of threads that a block has along time, `channels` to a block.
inline Tiling tile_rows(const Params& p, int64_t steps, int64_t groups, int64_t channels) {
  Tiling t{};
  t.steps = steps;
  t.channel_blocks = static_cast<uint32_t>(ceil_div(p.dim, channels));
  t.pieces = static_cast<uint32_t>(ceil_div(p.seqlen, steps * groups));
  number_tiles(t, p);
  return t;
}

inline Tiling tile_channels(const Params& p, bool vectors) {
  Tiling t{};
  t.vectors = vectors;
  t.threads_per_line = 1;
  while (t.threads_per_line < kChannelThreads && t.threads_per_line * kSteps < p.seqlen) t.threads_per_line *= 2;
  t.channel_blocks = static_cast<uint32_t>(ceil_div(p.dim, kChannelThreads / t.threads_per_line));
  t.pieces = static_cast<uint32_t>(ceil_div(p.seqlen, static_cast<int64_t>(t.threads_per_line) * kSteps));
  number_tiles(t, p);
  return t;
}

// Blocks for the W-1 inputs of every state.
inline int64_t state_blocks(const Params& p, const Tiling& t, int64_t threads) {
  return ceil_div(t.num_states * p.dim * (p.width - 1), threads);
}

}  // namespace fastlm::causal_conv1d::cuda
