// Sliding-window attention, backward, on sm_90a. With P = exp(s - lse) and dS = P (dout . v - delta) on visible pairs:
// dv_j = sum_i P_ij dout_i, dk_j = scale sum_i dS_ij q_i, dq_i = scale sum_j dS_ij k_j.
// A block holds a tile of 128 keys and walks over the blocks of queries that see some of them, for all heads that share the keys;
// dk and dv stay in registers (two consumer warpgroups of 64 keys each, which work on transposed weights, so that these are left
// operands in registers). Each step's part of dq goes to shared memory and from there, by a bulk copy that adds, to an fp32
// workspace. Bound by the tensor cores: five products.
//
// Deterministic: tiles of keys add to a block of queries in ascending order. A counter for each block says whose turn it is;
// tiles start in ascending order (by ticket) and walk over queries in descending order, so that a tile finds its turn come unless
// an earlier one is two steps late. The alternatives cost more: partial sums for every pair of tiles would move 128 KiB for every
// 5 us of products on each multiprocessor (3.4 TB/s), a kernel of its own for dq repeats two of five products.
//
// Zero weights times values that are not finite would be NaN: two warps replace such rows of keys, queries and dout by zeros
// where some pair is not visible, and make the weights of their visible pairs NaN instead.
#pragma once

#include "core/cuda/hopper.cuh"
#include "ops/sliding_window_attention/cuda/hopper_backward_tiles.cuh"
#include "ops/sliding_window_attention/cuda/hopper_softmax.cuh"

namespace fastlm::sliding_window_attention::cuda {

// ---- producer --------------------------------------------------------------------------------------------------------------
template <int kD>
__device__ __forceinline__ void copy_tiles(const HopperBackward& f, const BackwardShared<kD>& shared, const KeyTile& t) {
  using Shape = BackwardShape<kD>;
  mbarrier_arrive_expect(shared.kv_full, 2 * Shape::kKeyBytes);
#pragma unroll
  for (int i = 0; i < Shape::kPanels; ++i) {
    load_tile(shared.k + i * Shape::kKeys * 128, f.k, shared.kv_full, 64 * i, t.kv_head, t.k_begin + t.k0, t.batch);
    load_tile(shared.v + i * Shape::kKeys * 128, f.v, shared.kv_full, 64 * i, t.kv_head, t.k_begin + t.k0, t.batch);
  }
  Ring<Shape::kStages> ring;
  for_each_step(f, t, [&](int head, int block) {
    const auto copy = [&](const TensorMap& map, char* to, Mbarrier* full, Mbarrier* empty) {
      mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
      mbarrier_arrive_expect(full + ring.stage, Shape::kQueryBytes);
#pragma unroll
      for (int i = 0; i < Shape::kPanels; ++i) {
        load_tile(to + ring.stage * Shape::kQueryBytes + i * Shape::kQueries * 128, map, full + ring.stage, 64 * i, head,
                  t.q_begin + block * Shape::kQueries, t.batch);
      }
    };
    copy(f.q, shared.q, shared.q_full, shared.q_empty);
    copy(f.dout, shared.dout, shared.dout_full, shared.dout_empty);
    ring.step();
  });
}

// Slots of query blocks: the place of a head's block in the workspaces.
__device__ __forceinline__ int64_t query_slot(const HopperBackward& f, const KeyTile& t, int head, int block) {
  const int64_t slot = t.first_slot + block;
  return (int64_t{t.sequence_row} * f.p.num_heads + head) * f.queries.slots + min(slot, f.queries.slots - 1);
}

// One thread takes the sums of dq away, each at its turn.
template <int kD>
__device__ __forceinline__ void add_queries(const HopperBackward& f, const BackwardShared<kD>& shared, const KeyTile& t) {
  using Shape = BackwardShape<kD>;
  const bool ordered = *f.ordered != 0;
  int parity = 0;
  for_each_step(f, t, [&](int head, int block) {
    const int64_t slot = query_slot(f, t, head, block);
    const int turn = turn_of<kD>(f.p, t, block);
    float* sum = f.dq_sum + slot * Shape::kSumFloats;
    mbarrier_wait(shared.dq_full, parity);
    parity ^= 1;
    if (turn <= 0) {
      store_bulk(sum, shared.dq, Shape::kSumFloats * 4);
    } else {
      while (ordered && load_acquire(f.turns + slot) < turn) pause();
      fence_async_global();
      add_bulk(sum, shared.dq, Shape::kSumFloats * 4);
    }
    commit_bulk();
    wait_bulk();
    fence_async_global();
    add_release(f.turns + slot, 1);
    mbarrier_arrive(shared.dq_empty);
  });
}

// Zeros for the 64 kPanels elements of one row of a tile of kRows rows, if one of them is not finite.
template <class T, int kPanels, int kRows>
__device__ __forceinline__ bool drop_infinite_row(char* tile, int row) {
  bool found = false;
#pragma unroll 1
  for (int i = 0; i < kPanels * 8; ++i) found |= drop_infinite<T>(tile + i / 8 * kRows * 128 + swizzled_offset(row, i % 8));
  return found;
}

// Two warps bring lse and delta of each step's queries, and look through tiles that are not seen whole.
template <class T, int kD>
__device__ __forceinline__ void bring_rows(const HopperBackward& f, const BackwardShared<kD>& shared, const KeyTile& t,
                                           int thread) {
  using Shape = BackwardShape<kD>;
  constexpr int kThreads = Shape::kStatWarps * 32;
  const int lane = thread % 32;
  const auto arrive = [&](Mbarrier* b) {
    if (lane == 0) mbarrier_arrive(b);
  };
  mbarrier_wait(shared.kv_full, 0);
#pragma unroll 1
  for (int r = thread; r < Shape::kKeys; r += kThreads) {
    const bool found = drop_infinite_row<T, Shape::kPanels, Shape::kKeys>(shared.k, r);
    shared.key_flags[r] = found ? NAN : 0.0f;
  }
  fence_async_shared();
  __syncwarp();
  arrive(shared.k_checked);

  Ring<Shape::kStages> ring;
  for_each_step(f, t, [&](int head, int block) {
    mbarrier_wait(shared.q_empty + ring.stage, ring.parity ^ 1);
    if (t.edge(block)) {
      mbarrier_wait(shared.q_full + ring.stage, ring.parity);
      mbarrier_wait(shared.dout_full + ring.stage, ring.parity);
    }
#pragma unroll 1
    for (int r = thread; r < Shape::kQueries; r += kThreads) {
      const int i = block * Shape::kQueries + r;
      float lse = INFINITY, delta = 0.0f;
      if (i < t.q_len) {
        const int64_t at = t.batch * f.p.lse_batch_stride + head * f.p.lse_head_stride + t.q_begin + i;
        lse = static_cast<const float*>(f.p.lse)[at] * kLog2e;
        delta = static_cast<const float*>(f.p.row_delta)[at];
      }
      if (t.edge(block)) {
        bool found = drop_infinite_row<T, Shape::kPanels, Shape::kQueries>(shared.q + ring.stage * Shape::kQueryBytes, r);
        found |= drop_infinite_row<T, Shape::kPanels, Shape::kQueries>(shared.dout + ring.stage * Shape::kQueryBytes, r);
        if (found) lse = NAN;
      }
      shared.lse[ring.stage * Shape::kQueries + r] = lse;
      shared.delta[ring.stage * Shape::kQueries + r] = delta;
    }
    if (t.edge(block)) fence_async_shared();
    __syncwarp();
    arrive(shared.rows_full + ring.stage);
    arrive(shared.q_empty + ring.stage);
    arrive(shared.dout_empty + ring.stage);
    ring.step();
  });
}

template <class T, int kD>
__device__ __forceinline__ void backward_producer(const HopperBackward& f, char* memory, const KeyTile& t, int thread) {
  const BackwardShared<kD> shared(memory);
  const int warp = __shfl_sync(kFullWarp, thread / 32, 0), lane = thread % 32;
  if (t.first == t.last) return;
  if (warp == 0) {
    if (lane == 0) copy_tiles<kD>(f, shared, t);
  } else if (warp == 1) {
    if (lane == 0) add_queries<kD>(f, shared, t);
  } else {
    bring_rows<T, kD>(f, shared, t, thread - 64);
  }
  __syncwarp();
}

// ---- consumers -------------------------------------------------------------------------------------------------------------
template <class T, int kD, bool kSoftcap, int kBarrier>
__device__ __forceinline__ void backward_consumer(const HopperBackward& f, char* memory, const KeyTile& t, int warpgroup,
                                                  int thread) {
  using Shape = BackwardShape<kD>;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kPanels = Shape::kPanels;
  constexpr bool kEarly = kD == 128 && !kSoftcap;  // where registers allow: operands of dv before dp is there
  const BackwardShared<kD> shared(memory);
  const int lane = thread % 32, key_row = warpgroup * 64 + thread / 32 * 16 + lane / 4;  // and the row 8 further
  const uint64_t k_left = swizzled_operand(shared.k + warpgroup * 64 * 128, 16, 1024);   // (64 keys, kD)
  const uint64_t v_left = swizzled_operand(shared.v + warpgroup * 64 * 128, 16, 1024);
  const uint64_t q_keys = swizzled_operand(shared.q, 16, 1024);  // right operand (kD, queries)
  const uint64_t dout_keys = swizzled_operand(shared.dout, 16, 1024);
  const uint64_t q_right = swizzled_operand(shared.q, kQueries * 128, 1024);  // right operand (queries, kD)
  const uint64_t dout_right = swizzled_operand(shared.dout, kQueries * 128, 1024);
  // This warpgroup's quarter of (queries, keys) (keys, kD): 64 columns of dq, or 64 queries where heads are 64 wide.
  const uint64_t k_right = swizzled_operand(shared.k + (kPanels == 2 ? warpgroup * kKeys * 128 : 0), 16, 1024);
  const uint64_t weights_left = swizzled_operand(shared.weights + (kPanels == 2 ? 0 : warpgroup * kKeys * 128), 16, 1024);

  float dk[kD / 2], dv[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.0f;
  const auto release = [&](Mbarrier* b) {
    if (lane == 0) mbarrier_arrive(b);
  };

  if (t.first < t.last) {
    float unit[2];
    KeyRange seen[2];
    mbarrier_wait(shared.kv_full, 0);
    mbarrier_wait(shared.k_checked, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unit[i] = shared.key_flags[key_row + 8 * i] + (kSoftcap ? 1.0f : f.score.gradient_scale) * kLog2e;
      seen[i] = queries_of(f.p, t, t.k0 + key_row + 8 * i);
    }
    Ring<Shape::kStages> ring;
    int count = 0;
    for_each_step(f, t, [&](int, int block) {
      const int stage = ring.stage * Shape::kQueryBytes;
      float s[kQueries / 2], dp[kQueries / 2], dq[32];
      uint32_t p_left[kQueries / 16][4], ds_left[kQueries / 16][4];

      mbarrier_wait(shared.q_full + ring.stage, ring.parity);
      hold_registers(s);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) {
        wgmma<T, kQueries, Major::kK, Major::kK>(s, operand_at(k_left, i / 4 * kKeys * 128 + i % 4 * 32),
                                                 operand_at(q_keys, stage + i / 4 * kQueries * 128 + i % 4 * 32), i > 0);
      }
      wgmma_commit();
      mbarrier_wait(shared.dout_full + ring.stage, ring.parity);
      hold_registers(dp);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) {
        wgmma<T, kQueries, Major::kK, Major::kK>(dp, operand_at(v_left, i / 4 * kKeys * 128 + i % 4 * 32),
                                                 operand_at(dout_keys, stage + i / 4 * kQueries * 128 + i % 4 * 32), i > 0);
      }
      wgmma_commit();
      mbarrier_wait(shared.rows_full + ring.stage, ring.parity);
      const float* lse = shared.lse + ring.stage * kQueries + lane % 4 * 2;
      const float* delta = shared.delta + ring.stage * kQueries + lane % 4 * 2;

      wgmma_wait<1>();
      hold_registers(s);
      if constexpr (!kSoftcap) {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
          const float2 row = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            s[4 * j + 2 * i] = exp2_approx(fmaf(s[4 * j + 2 * i], unit[i], -row.x));
            s[4 * j + 2 * i + 1] = exp2_approx(fmaf(s[4 * j + 2 * i + 1], unit[i], -row.y));
          }
        }
      }
      const bool edge = t.edge(block);
      const int begin[2] = {seen[0].begin - block * kQueries, seen[1].begin - block * kQueries};
      const int end[2] = {seen[0].end - block * kQueries, seen[1].end - block * kQueries};
      if constexpr (kEarly) {
        if (edge) mask<kQueries>(s, begin, end, 0.0f, lane);
        to_operand<T, kQueries>(s, p_left);
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < kQueries / 4; ++i) all |= p_left[i / 4][i % 4];
        finish_before(__uint_as_float(all));  // the weights are computed while dp is multiplied
      }
      wgmma_wait<0>();
      hold_registers(dp);
      if constexpr (kSoftcap) {
#pragma unroll
        for (int j = 0; j < kQueries / 2; ++j) {
          const int column = j / 4 * 8 + j % 2;
          const float bent = f.score.apply_approx(s[j]);
          s[j] = exp2_approx(fmaf(bent, unit[j / 2 % 2], -lse[column]));
          dp[j] = (dp[j] - delta[column]) * (s[j] * f.score.slope(bent));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
          const float2 row = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            dp[4 * j + 2 * i] = s[4 * j + 2 * i] * (dp[4 * j + 2 * i] - row.x);
            dp[4 * j + 2 * i + 1] = s[4 * j + 2 * i + 1] * (dp[4 * j + 2 * i + 1] - row.y);
          }
        }
      }
      if (edge) mask<kQueries>(dp, begin, end, 0.0f, lane);
      if constexpr (!kEarly) {
        if (edge) mask<kQueries>(s, begin, end, 0.0f, lane);
        to_operand<T, kQueries>(s, p_left);
      }
      to_operand<T, kQueries>(dp, ds_left);

      hold_registers(dv);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        wgmma<T, kD, Major::kMN>(dv, p_left[i], operand_at(dout_right, stage + i * 2048), true);
      }
      wgmma_commit();

      // Every two steps the same buffer: both warpgroups have met at the barrier of the step between, their products done.
      char* weights = shared.weights + count % 2 * Shape::kWeightBytes;
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<uint32_t*>(weights + j / 8 * kKeys * 128 + swizzled_offset(key_row + 8 * i, j % 8) + lane % 4 * 4) =
              ds_left[j / 2][i + j % 2 * 2];
        }
      }
      fence_async_shared();
      sync_named(kBarrier, 256);
      hold_registers(dq);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        wgmma<T, 64, Major::kMN, Major::kMN>(dq, operand_at(weights_left, count % 2 * Shape::kWeightBytes + i * 2048),
                                             operand_at(k_right, i * 2048), i > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      hold_registers(dv);
      release(shared.dout_empty + ring.stage);

      hold_registers(dk);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        wgmma<T, kD, Major::kMN>(dk, ds_left[i], operand_at(q_right, stage + i * 2048), true);
      }
      wgmma_commit();
      wgmma_wait<1>();
      hold_registers(dq);
      mbarrier_wait(shared.dq_empty, count % 2 ^ 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        reinterpret_cast<float4*>(shared.dq)[(warpgroup * 8 + i) * 128 + thread] =
            make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
      fence_async_shared();
      __syncwarp();
      release(shared.dq_full);
      wgmma_wait<0>();
      hold_registers(dk);
      release(shared.q_empty + ring.stage);
      ring.step();
      ++count;
    });
  }

  T *dk_row[2], *dv_row[2];
  bool real[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = t.k0 + key_row + 8 * i;
    real[i] = key < t.k_len;
    dk_row[i] = head_row<T>(f.p.dk, t.batch, int64_t{t.k_begin} + key, t.kv_head);
    dv_row[i] = head_row<T>(f.p.dv, t.batch, int64_t{t.k_begin} + key, t.kv_head);
  }
  store_rows<T, kD>(dk, {f.score.gradient_scale, f.score.gradient_scale}, dk_row, real, f.p.head_dim, lane);
  store_rows<T, kD>(dv, {1.0f, 1.0f}, dv_row, real, f.p.head_dim, lane);
}

// ---- kernels ---------------------------------------------------------------------------------------------------------------
template <class T, int kD, bool kSoftcap>
__global__ void __launch_bounds__(BackwardShape<kD>::kThreads, 1) hopper_backward(const __grid_constant__ HopperBackward f) {
#if FASTLM_HOPPER_BODY
  char* memory = shared_memory();
  const BackwardShared<kD> shared(memory);
  const int thread = static_cast<int>(threadIdx.x), warpgroup = __shfl_sync(kFullWarp, thread / 128, 0);
  if (thread == 0) {
    prefetch_map(f.q);
    prefetch_map(f.k);
    prefetch_map(f.v);
    prefetch_map(f.dout);
    shared.open();
    *shared.ticket = atomicAdd(f.ticket, 1);
  }
  __syncthreads();
  const KeyTile t = key_tile<kD>(f, *shared.ticket);
  if (!t.any()) return;
  if (warpgroup == 0) {
    give_registers<40>();
    backward_producer<T, kD>(f, memory, t, thread);
  } else {
    take_registers<232>();
    backward_consumer<T, kD, kSoftcap, 1>(f, memory, t, warpgroup - 1, thread % 128);
  }
#else
  __trap();
#endif
}

// Counters to zero, and whether the bounds of packed sequences ascend. One block; the same for every kD.
template <int kD>
__global__ void __launch_bounds__(1024) hopper_backward_prepare(const HopperBackward f) {
  const int64_t count = f.queries.count;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) f.turns[i] = 0;
  if (threadIdx.x == 0) *f.ticket = 0;
  const DeviceSequences& d = f.p.device;
  int descents = 0;
  if (d.cu_q != nullptr) {
    const auto before = [](const void* cu, bool is_64, int64_t s, int64_t total) {
      return clamp_bound(load_index(cu, is_64, s), 0, total) > clamp_bound(load_index(cu, is_64, s + 1), 0, total);
    };
    for (int64_t s = threadIdx.x; s < d.num_sequences; s += blockDim.x) {
      descents |= before(d.cu_q, d.cu_q_64, s, d.total_q) || before(d.cu_k, d.cu_k_64, s, d.total_k);
    }
  }
  if (threadIdx.x == 0) *f.ordered = 1;
  __syncthreads();
  if (descents != 0) *f.ordered = 0;
}

// dq from its sums: a block of queries for each block of threads.
template <class T, int kD>
__global__ void __launch_bounds__(256) hopper_backward_finish(const HopperBackward f) {
  using Shape = BackwardShape<kD>;
  const BackwardParams& p = f.p;
  const int64_t slot = blockIdx.x % f.queries.slots, head_row_index = blockIdx.x / f.queries.slots;
  int64_t sequence = head_row_index / p.num_heads, row = slot * Shape::kQueries;
  const int64_t head = head_row_index % p.num_heads;
  if (p.device.cu_q != nullptr) {
    const Tile start = tile_of(p, slot, Shape::kQueries);
    sequence = start.sequence;
    row = start.first;
  }
  const Sequence s = sequence_of(p, sequence);
  if (row >= s.q_len) return;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / 128, lane = thread % 32;
  const Range keys = visible_keys(p, s, row, min(row + Shape::kQueries, s.q_len) - 1);
  float sum[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (keys.begin < keys.end) {
      x = reinterpret_cast<const float4*>(f.dq_sum +
                                          int64_t{blockIdx.x} * Shape::kSumFloats)[warpgroup * 1024 + i * 128 + thread % 128];
    }
    sum[4 * i] = x.x;
    sum[4 * i + 1] = x.y;
    sum[4 * i + 2] = x.z;
    sum[4 * i + 3] = x.w;
  }
  const int first_row = thread % 128 / 32 * 16 + (Shape::kPanels == 2 ? 0 : warpgroup * 64);
  const int first_column = Shape::kPanels == 2 ? warpgroup * 64 : 0;
  T* out[2];
  bool real[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t r = row + first_row + lane / 4 + 8 * i;
    real[i] = r < s.q_len;
    out[i] = head_row<T>(p.dq, s.batch, s.q_begin + r, head) + first_column;
  }
  store_rows<T, 64>(sum, {f.score.gradient_scale, f.score.gradient_scale}, out, real, p.head_dim - first_column, lane);
}

}  // namespace fastlm::sliding_window_attention::cuda
