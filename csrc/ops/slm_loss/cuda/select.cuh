// Radix select by one or several blocks for each segment of tokens. Digits of 11 bits from the top, as on the CPU; a pass counts
// the digits of the keys that share those found so far, in shared memory and, where there are several blocks, then in global
// memory, with a barrier of these blocks. Counters are integers: no result depends on the order of anything.
#pragma once

#include <limits>
#include <type_traits>

#include "core/cuda/device.cuh"
#include "core/cuda/grid_barrier.cuh"
#include "ops/slm_loss/cuda/block_sum.cuh"
#include "ops/slm_loss/cuda/select.h"
#include "ops/slm_loss/keys.h"

namespace fastlm::slm_loss::cuda {

constexpr int kDigits = 1 << kDigitBits;
constexpr int kGroup = 4;          // tokens of a lane that lie side by side, from a multiple of 4 on
constexpr int kRow = 32 * kGroup;  // tokens of a warp at a time
constexpr int kOrderPasses = 6;    // of 64 bits

template <class T>
using KeyOf = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <class Key>
constexpr int kPasses = (8 * static_cast<int>(sizeof(Key)) + kDigitBits - 1) / kDigitBits;

// Counters in global memory, zero before the launch: per segment one for the barrier and one of each block's ties, then bins.
constexpr int64_t counters_of(int64_t segments, int64_t blocks) { return segments * (1 + blocks); }

struct SelectShared {
  uint32_t bins[kDigits + 4];
  uint32_t sums[32];
  uint32_t digit, above, count, unused;
};

template <class T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Packed {
  T at[kElements];
};

struct BlockThreads {
  int thread;
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// The k-th largest of a set of keys: its key, how many are larger and how many are equal.
template <class K>
struct Found {
  K key;
  uint32_t k, above, equal;
};

// Counts the digit of a key if `wanted` and if the digits above it are those of `prefix`.
template <class K>
struct DigitCount {
  uint32_t* bins;
  K prefix;
  int top, shift;
  uint32_t digit_mask;

  __device__ __forceinline__ uint32_t digit(K key) const { return static_cast<uint32_t>(key >> shift) & digit_mask; }
  // Of all keys, for the first digit: without a branch, what is not wanted goes to a bin that nobody reads.
  __device__ __forceinline__ void any(K key, bool wanted) const { atomicAdd(&bins[wanted ? digit(key) : kDigits], 1u); }
  __device__ __forceinline__ void few(K key, bool wanted) const {
    // Two steps: a shift by the width of the type is undefined.
    if (wanted && (key ^ prefix) >> (top - 1) >> 1 == 0) atomicAdd(&bins[digit(key)], 1u);
  }
};

template <class T, int kThreads>
class Selector {
 public:
  using Score = acc_t<T>;
  using Key = KeyOf<T>;
  static constexpr int kBatch = sizeof(Key) == 8 ? 2 : 4;  // rows whose reads are under way at once

  __device__ __forceinline__ Selector(const SelectParams& p, int blocks, int capacity)
      : p_(p),
        shared_(*reinterpret_cast<SelectShared*>(fastlm::cuda::shared_memory())),
        keys_(reinterpret_cast<Key*>(fastlm::cuda::shared_memory() + sizeof(SelectShared))),
        cached_rows_(capacity / kRow),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        blocks_(blocks),
        rank_(static_cast<int>(blockIdx.x) % blocks),
        segment_(static_cast<int64_t>(blockIdx.x) / blocks) {
    auto* const counters = static_cast<int32_t*>(p.workspace);
    barrier_ = {counters + segment_, 0};
    ties_ = counters + p.segments + segment_ * blocks;
    const int64_t passes = kPasses<Key> + (p.random_ties ? kOrderPasses : 0);
    bins_ = reinterpret_cast<uint32_t*>(counters + counters_of(p.segments, blocks)) + segment_ * passes * kDigits;
    take_share();
  }

  __device__ __forceinline__ void run() {
    uint32_t eligible = 0;
    const Found<Key> found = kth_largest<Key, false>(
        [&](auto&& count, bool first) {
          if (first) {
            for_each_group<true>([&](int, const Key(&key)[kGroup]) {
#pragma unroll
              for (int i = 0; i < kGroup; ++i) count.any(key[i], key[i] != 0);
            });
          } else {
            for_each_group<false>([&](int, const Key(&key)[kGroup]) {
#pragma unroll
              for (int i = 0; i < kGroup; ++i) count.few(key[i], key[i] != 0);
            });
          }
        },
        [&](uint32_t total) { return kept_of(eligible = total); });
    if (rank_ == 0 && thread_ == 0) {
      static_cast<Score*>(p_.threshold)[segment_] =
          found.k > 0 ? to_score<Score>(found.key) : std::numeric_limits<Score>::infinity();
      int64_t* const counts = p_.counts + 3 * segment_;
      counts[0] = eligible;
      counts[1] = found.k;
      counts[2] = found.equal;
    }
    const uint32_t wanted = found.k - found.above;
    if (wanted == found.equal) {  // the usual case: nobody at the threshold is left out; or nobody is selected at all
      const bool any = found.k > 0;
      write_mask([&](int, Key key) { return any && key >= found.key; });
    } else if (p_.random_ties) {
      take_random(found.key, wanted);
    } else {
      take_first(found.key, wanted);
    }
  }

 private:
  // The tokens of this block: whole groups of the segment, which is cut at multiples of 4. What the bounds say is clamped so that
  // segments lie inside of the tensors and, whatever the bounds are, cover them.
  __device__ __forceinline__ void take_share() {
    int64_t begin = 0, end = p_.total;
    if (p_.cu_seqlens != nullptr) {
      const auto clamped = [&](int64_t i, int64_t low) {
        const int64_t x = fastlm::cuda::load_index(p_.cu_seqlens, p_.cu_seqlens_64, i);
        return x < low ? low : x > p_.total ? p_.total : x;
      };
      if (segment_ > 0) begin = clamped(segment_, 0);
      if (segment_ + 1 < p_.segments) end = clamped(segment_ + 1, begin);
    }
    const int64_t first = begin / kGroup, groups = (end + kGroup - 1) / kGroup - first;
    const int64_t share = (groups + blocks_ - 1) / blocks_;
    const int64_t from = first + min(rank_ * share, groups), to = first + min((rank_ + 1) * share, groups);
    origin_ = from * kGroup;
    begin_ = static_cast<int>(max(begin, origin_) - origin_);
    const int rows = static_cast<int>((to - from + 31) / 32), each = (rows + kThreads / 32 - 1) / (kThreads / 32);
    row_begin_ = min(thread_ / 32 * each, rows);
    row_end_ = min(row_begin_ + each, rows);
    stop_ = static_cast<int>(min(min(end, to * kGroup) - origin_, static_cast<int64_t>(row_end_) * kRow));
  }

  // select.h's kept_of; its product and its sum are rounded one by one, as on the CPU.
  __device__ __forceinline__ uint32_t kept_of(uint32_t n) const {
    if (n == 0 || p_.keep_ratio == 0) return 0;
    const auto kept = static_cast<int64_t>(__dadd_rn(__dmul_rn(p_.keep_ratio, static_cast<double>(n)), 0.5));
    return static_cast<uint32_t>(min(max(kept, int64_t{1}), static_cast<int64_t>(n)));
  }

  // Scores and flags of kBatch rows, one group of tokens for each lane; no flag where a token is not of this warp.
  __device__ __forceinline__ void read(int row, T (&value)[kBatch][kGroup], uint32_t (&flags)[kBatch]) const {
    const auto* const score = static_cast<const T*>(p_.score) + origin_;
    const bool* const allowed = p_.allowed + origin_;
    const int first = row * kRow + lane_ * kGroup;
    if (p_.vectors && row * kRow >= begin_ && (row + kBatch) * kRow <= stop_) {  // the same for all lanes
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const auto values = *reinterpret_cast<const Packed<T, kGroup>*>(score + first + b * kRow);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) value[b][i] = values.at[i];
        flags[b] = *reinterpret_cast<const uint32_t*>(allowed + first + b * kRow);
      }
      return;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      flags[b] = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int at = first + b * kRow + i;
        const bool inside = at >= begin_ && at < stop_;
        value[b][i] = inside ? score[at] : T{};
        flags[b] |= static_cast<uint32_t>(inside && allowed[at]) << 8 * i;
      }
    }
  }

  // Calls f(at, keys of the tokens at to at + 3) for this warp's groups in order, one for each lane at a time; keys of tokens
  // that are not of this warp are 0. `kFirst`: the first time; later the keys of as many rows as fit are in shared memory.
  template <bool kFirst, class F>
  __device__ __forceinline__ void for_each_group(F&& f) {
    using Keys = Packed<Key, kGroup>;
#pragma unroll 1
    for (int row = row_begin_; row < row_end_; row += kBatch) {
      Keys key[kBatch];
      const bool cached = row + kBatch <= cached_rows_;
      const int first = row * kRow + lane_ * kGroup;
      if (!kFirst && cached) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          key[b] = first + b * kRow < stop_ ? *reinterpret_cast<const Keys*>(keys_ + first + b * kRow) : Keys{};
        }
      } else {
        T value[kBatch][kGroup];
        uint32_t flags[kBatch];
        read(row, value, flags);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            key[b].at[i] = to_key<Key>(fastlm::cuda::to_acc(value[b][i]), (flags[b] >> 8 * i & 0xff) != 0);
          }
          if (kFirst && cached && first + b * kRow < stop_) *reinterpret_cast<Keys*>(keys_ + first + b * kRow) = key[b];
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) f(first + b * kRow, key[b].at);
    }
  }

  // Writes mask[i] = taken(token, key) for a group of tokens.
  template <class Taken>
  __device__ __forceinline__ void store_group(int at, const Key (&key)[kGroup], Taken&& taken) const {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) word |= static_cast<uint32_t>(taken(at + i, key[i])) << 8 * i;
    bool* const mask = p_.mask + origin_;
    if (at >= begin_ && at + kGroup <= stop_) {
      *reinterpret_cast<uint32_t*>(mask + at) = word;
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (at + i >= begin_ && at + i < stop_) mask[at + i] = (word >> 8 * i & 1) != 0;
    }
  }
  template <class Taken>
  __device__ __forceinline__ void write_mask(Taken&& taken) {
    for_each_group<false>([&](int at, const Key(&key)[kGroup]) { store_group(at, key, taken); });
  }

  // `visit(count, first)` counts every key of this block; `rank(n)` says which of all n keys is looked for, 0 for none.
  // `kMayStop`: a lower bound of the key will do, one that no other key lies between.
  template <class K, bool kMayStop, class Visit, class Rank>
  __device__ __forceinline__ Found<K> kth_largest(Visit&& visit, Rank&& rank) {
    constexpr int kBits = 8 * sizeof(K), kOwn = kDigits / kThreads;
    Found<K> found{};
#pragma unroll 1
    for (int top = kBits; top > 0;) {
      const int shift = max(top - kDigitBits, 0);
      const auto digit_mask = static_cast<uint32_t>(kDigits - 1) >> (kDigitBits - (top - shift));
      for (int i = thread_; i < kDigits; i += kThreads) shared_.bins[i] = 0;
      __syncthreads();
      visit(DigitCount<K>{shared_.bins, found.key, top, shift, digit_mask}, top == kBits);
      __syncthreads();
      const uint32_t* counts = shared_.bins;
      if (blocks_ > 1) {
        for (int i = thread_; i < kDigits; i += kThreads) {
          if (shared_.bins[i] != 0) atomicAdd(&bins_[i], shared_.bins[i]);
        }
        barrier_.wait(blocks_, BlockThreads{thread_});
        counts = bins_;
        bins_ += kDigits;
      }
      uint32_t count[kOwn], own = 0;
      const int highest = kDigits - 1 - thread_ * kOwn;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own += count[i] = counts[highest - i];
      const Sums sums = block_sums<kThreads>(own, shared_.sums);
      if (top == kBits) found.k = rank(sums.total);
      if (found.k == 0) return found;
      const uint32_t wanted = found.k - found.above;
      uint32_t above = sums.before;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (above < wanted && wanted <= above + count[i]) {
          shared_.digit = static_cast<uint32_t>(highest - i);
          shared_.above = above;
          shared_.count = count[i];
        }
        above += count[i];
      }
      __syncthreads();
      found.key |= static_cast<K>(shared_.digit) << shift;
      found.above += shared_.above;
      found.equal = shared_.count;
      if (kMayStop && found.above + found.equal == found.k) break;
      top = shift;
    }
    return found;
  }

  // Of the tokens with the key `least`, the `wanted` that come first.
  __device__ __forceinline__ void take_first(Key least, uint32_t wanted) {
    uint32_t own = 0;
    for_each_group<false>([&](int, const Key(&key)[kGroup]) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) own += key[i] == least;
    });
    const Sums ties = block_sums<kThreads>(own, shared_.sums);
    uint32_t before = __shfl_sync(fastlm::cuda::kFullWarp, ties.before, 0);  // of the warp
    if (blocks_ > 1) {
      if (thread_ == 0) fastlm::cuda::add_release(ties_ + rank_, static_cast<int>(ties.total) + 1);  // 0: not yet known
      uint32_t below = 0;
      for (int i = thread_; i < rank_; i += kThreads) {
        int known;
        while ((known = fastlm::cuda::load_acquire(ties_ + i)) == 0) fastlm::cuda::pause();
        below += static_cast<uint32_t>(known - 1);
      }
      __syncthreads();  // shared_.sums
      before += block_sums<kThreads>(below, shared_.sums).total;
    }
    const uint32_t lower_lanes = (1u << lane_) - 1;
    for_each_group<false>([&](int at, const Key(&key)[kGroup]) {
      uint32_t place = before;  // among the ties, of this lane's next one
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t lanes = __ballot_sync(fastlm::cuda::kFullWarp, key[i] == least);
        place += static_cast<uint32_t>(__popc(lanes & lower_lanes));
        before += static_cast<uint32_t>(__popc(lanes));
      }
      store_group(at, key, [&](int, Key k) { return k > least || (k == least && place++ < wanted); });
    });
  }

  // The `wanted` that come first in random order: keys are complements of places, so that the largest are looked for here too.
  __device__ __forceinline__ void take_random(Key least, uint32_t wanted) {
    const auto order = [&](int at) { return ~tie_order(p_.mixed_seed, static_cast<uint64_t>(origin_ + at)); };
    const Found<uint64_t> last = kth_largest<uint64_t, true>(
        [&](auto&& count, bool) {
          for_each_group<false>([&](int at, const Key(&key)[kGroup]) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              if (key[i] == least) count.few(order(at + i), true);
            }
          });
        },
        [&](uint32_t) { return wanted; });
    write_mask([&](int at, Key key) { return key > least || (key == least && order(at) >= last.key); });
  }

  const SelectParams& p_;
  SelectShared& shared_;
  Key* const keys_;
  const int cached_rows_, thread_, lane_, blocks_, rank_;
  const int64_t segment_;
  fastlm::cuda::GridBarrier barrier_;
  int32_t* ties_;            // (blocks,)
  uint32_t* bins_;           // of the next pass
  int64_t origin_;           // the block's first token, a multiple of kGroup; positions below count from it
  int begin_, stop_;         // the first token of the segment and the one after the last of this warp
  int row_begin_, row_end_;  // of this warp
};

}  // namespace fastlm::slm_loss::cuda
