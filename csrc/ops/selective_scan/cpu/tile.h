// Tiles: kChunk positions of a block of channels, copied from any memory layout into fp32 scratch (fp64 for fp64) and back. In
// scratch, channels lie in vectors and time runs inside: element (channel c, position t) is at c / lanes * kPitch + t * lanes +
// c % lanes. Walking the tensors themselves down time would touch a new page at every step and run three times slower.
#pragma once

#include "core/simd/simd.h"
#include "core/simd/transpose.h"
#include "ops/selective_scan/cpu/kernels.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using selective_scan::Activation;
using selective_scan::kChannelAlign;
using selective_scan::kChunk;
using selective_scan::kStateGroup;
using selective_scan::Plan;
using selective_scan::Projection;

constexpr int64_t kStrip = 32;  // channels whose tiles are in scratch at a time

// One cache line more than a vector's tile: tiles of neighbouring vectors fall into different cache sets.
template <class A>
constexpr int64_t kPitch = kChunk * lanes_of<A> + 64 / static_cast<int64_t>(sizeof(A));

// A block of channels of one group.
struct Block {
  int64_t group;
  int64_t dim;    // first channel in the tensors
  int64_t array;  // first channel in ChannelArrays
  int64_t count;  // channels
};

FASTLM_INLINE Block block_of(const Plan& plan, int64_t index) {
  const int64_t group = index / plan.blocks_per_group;
  const int64_t first = index % plan.blocks_per_group * plan.block;
  return {group, group * plan.group_dim + first, group * plan.padded_dim + first, min_of(plan.block, plan.group_dim - first)};
}

// Positions [t0, t0 + length) of `count` channels from `dim` on. Lanes without a channel become 0; positions from `length` on
// are undefined.
template <class T>
void load_tile(const Activation& x, int64_t batch, int64_t t0, int64_t length, int64_t dim, int64_t count, acc_t<T>* tile) {
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride + t0 * x.seq_stride + dim * x.dim_stride;
  if (x.dim_stride == 1) {
    for (int64_t t = 0; t < length; ++t) {
      const T* row = from + t * x.seq_stride;
      for (int64_t c = 0; c < count; c += kLanes) {
        store(tile + c / kLanes * kPitch<acc_t<T>> + t * kLanes, load_upto(row + c, count - c));
      }
    }
    return;
  }
  for (int64_t c = 0; c < count; c += kLanes) {
    acc_t<T>* to = tile + c / kLanes * kPitch<acc_t<T>>;
    for (int64_t t = 0; t < length; t += kLanes) {
      V rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = c + i < count ? load_upto(from + (c + i) * x.dim_stride + t, length - t) : zero<V>();
      }
      transpose(rows);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (t + i) * kLanes, rows[i]);
    }
  }
}

template <class T>
void store_tile(const Activation& x, int64_t batch, int64_t t0, int64_t length, int64_t dim, int64_t count,
                const acc_t<T>* tile) {
  using V = vec_t<T>;
  constexpr int64_t kLanes = lanes_of<T>;
  T* to = static_cast<T*>(x.data) + batch * x.batch_stride + t0 * x.seq_stride + dim * x.dim_stride;
  if (x.dim_stride == 1) {
    for (int64_t t = 0; t < length; ++t) {
      T* row = to + t * x.seq_stride;
      for (int64_t c = 0; c < count; c += kLanes) {
        store_upto(row + c, load(tile + c / kLanes * kPitch<acc_t<T>> + t * kLanes), count - c);
      }
    }
    return;
  }
  for (int64_t c = 0; c < count; c += kLanes) {
    const acc_t<T>* from = tile + c / kLanes * kPitch<acc_t<T>>;
    for (int64_t t = 0; t < length; t += kLanes) {
      V rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(from + (t + i) * kLanes);
      transpose(rows);
      for (int64_t i = 0; i < kLanes && c + i < count; ++i) {
        store_upto(to + (c + i) * x.dim_stride + t, rows[i], length - t);
      }
    }
  }
}

// The tiles that will be worked on next. Asking for them a few lines at a time between pieces of arithmetic keeps the memory busy
// without ever waiting for it: their rows (or channels, if time is contiguous) lie pages apart, where no hardware prefetcher
// follows, and a burst of requests would fill the core's few buffers for outstanding misses.
template <class T>
struct Ahead {
  const Activation* const* tensors;  // null-terminated; those without data are passed over
  int64_t batch, t0, length, dim, count;

  // Part `part` of `parts`.
  FASTLM_INLINE void ask(int64_t part, int64_t parts) const {
    if (length <= 0) return;
    const Range positions = share(length, part, parts), channels = share(count, part, parts);
    for (const Activation* const* next = tensors; *next != nullptr; ++next) {
      const Activation& x = **next;
      if (x.data == nullptr) continue;
      const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride + t0 * x.seq_stride + dim * x.dim_stride;
      const bool rows = x.dim_stride == 1;
      const Range runs = rows ? positions : channels;
      const int64_t bytes = (rows ? count : length) * static_cast<int64_t>(sizeof(T));
      const int64_t stride = rows ? x.seq_stride : x.dim_stride;
      for (int64_t i = runs.begin; i < runs.end; ++i) {
        const char* run = reinterpret_cast<const char*>(from + i * stride);
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(run + b, 0, 2);
      }
    }
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  // Narrow division: a wide one takes twice as long, and there are four for every few thousand cycles of work.
  static FASTLM_INLINE Range share(int64_t n, int64_t part, int64_t parts) {
    const auto each = static_cast<uint32_t>(n), of = static_cast<uint32_t>(parts), at = static_cast<uint32_t>(part);
    return {each * at / of, each * (at + 1) / of};
  }
};

// The strip of kStrip channels after the one at (t0, first) of a block: the next channels, or the
// first ones of the next tile, which begins at next_t0 and has next_length positions.
template <class T>
FASTLM_INLINE Ahead<T> strip_ahead(const Activation* const* tensors, int64_t batch, const Block& block, int64_t first, int64_t t0,
                                   int64_t length, int64_t next_t0, int64_t next_length) {
  const int64_t next = first + kStrip;
  if (next < block.count) return {tensors, batch, t0, length, block.dim + next, min_of(kStrip, block.count - next)};
  return {tensors, batch, next_t0, next_length, block.dim, min_of(kStrip, block.count)};
}

// B or C of one of its own groups as (kChunk, padded_state); padding states become 0.
template <class T>
void load_projection(const Projection& x, int64_t state, int64_t padded_state, int64_t batch, int64_t group, int64_t t0,
                     int64_t length, acc_t<T>* to) {
  constexpr int64_t kLanes = lanes_of<T>;
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride + group * x.group_stride + t0 * x.seq_stride;
  if (x.state_stride == 1) {
    for (int64_t t = 0; t < length; ++t) {
      acc_t<T>* row = to + t * padded_state;
      for (int64_t n = 0; n < state; n += kLanes) {
        store_upto(row + n, load_upto(from + t * x.seq_stride + n, state - n), state - n);
      }
    }
  } else {
    for (int64_t n = 0; n < state; ++n) {
      for (int64_t t = 0; t < length; ++t) to[t * padded_state + n] = to_acc(from[t * x.seq_stride + n * x.state_stride]);
    }
  }
  for (int64_t n = state; n < padded_state; ++n) {
    for (int64_t t = 0; t < length; ++t) to[t * padded_state + n] = acc_t<T>(0);
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_CPU_LEVEL
