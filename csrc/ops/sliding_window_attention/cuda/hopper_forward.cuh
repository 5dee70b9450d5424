// Sliding-window attention, forward, on sm_90a: out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys that query i sees.
// After FlashAttention-3 (Shah et al., arXiv 2407.08608). A block holds a tile of 128 queries of one head; a producer warpgroup
// copies blocks of keys and values into a ring of stages (TMA), two consumer warpgroups of 64 queries each keep weights and sums
// in registers: while the tensor cores multiply for one of them, the other computes its softmax, and within each the scores of a
// block are multiplied while the values of the one before are. Bound by the tensor cores: 4 * 128 * 128 * 128 operations for a
// block of keys against 64 KiB read from the second-level cache.
//
// A weight of zero times a value that is not finite would be NaN: idle warps of the producer look through the blocks that some
// query does not see whole, replace such values by zeros, and the rows that do see them are repaired at the end.
//
// The roles are functions of their own, so that another kernel can run them beside something else.
#pragma once

#include "core/cuda/hopper.cuh"
#include "ops/sliding_window_attention/cuda/hopper_softmax.cuh"
#include "ops/sliding_window_attention/cuda/hopper_tiles.cuh"

namespace fastlm::sliding_window_attention::cuda {

// kD: width of a head, padded to 64, 128 or 256.
template <int kD>
struct HopperShape {
  static constexpr int kRows = 128, kWarpgroupRows = 64;
  static constexpr int kKeys = kD == 256 ? 64 : 128;
  static constexpr int kStages = kD == 64 ? 4 : 2;
  static constexpr int kPanels = kD / 64;  // of 64 columns, 128 bytes
  static constexpr int kQueryBytes = kRows * kD * 2, kBlockBytes = kKeys * kD * 2;
  static constexpr bool kTakeTurns = kD <= 128;  // wider heads keep the tensor cores busy without
  static constexpr int kThreads = 384;
  static constexpr int kScanWarps = 3;
};

template <int kD>
struct ForwardShared {
  using Shape = HopperShape<kD>;
  char* q;  // panels (kRows, 64)
  char* k;  // stages of panels (kKeys, 64)
  char* v;
  Mbarrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty, *v_checked;
  int* repair;  // (stages, scan warps): the block held values that are not finite

  static constexpr int kBytes =
      Shape::kQueryBytes + 2 * Shape::kStages * Shape::kBlockBytes + (2 + 5 * Shape::kStages) * 8 + Shape::kStages * 16;

  __device__ __forceinline__ explicit ForwardShared(char* shared) {
    q = shared;
    k = q + Shape::kQueryBytes;
    v = k + Shape::kStages * Shape::kBlockBytes;
    q_full = reinterpret_cast<Mbarrier*>(v + Shape::kStages * Shape::kBlockBytes);
    q_empty = q_full + 1;
    k_full = q_empty + 1;
    k_empty = k_full + Shape::kStages;
    v_full = k_empty + Shape::kStages;
    v_empty = v_full + Shape::kStages;
    v_checked = v_empty + Shape::kStages;
    repair = reinterpret_cast<int*>(v_checked + Shape::kStages);
  }

  // By one thread; a barrier of the block must follow.
  __device__ __forceinline__ void open() const {
    mbarrier_init(q_full, 1);
    mbarrier_init(q_empty, 8);  // consumer warps
    for (int i = 0; i < Shape::kStages; ++i) {
      mbarrier_init(k_full + i, 1);
      mbarrier_init(k_empty + i, 8);
      mbarrier_init(v_full + i, 1);
      mbarrier_init(v_empty + i, 8 + Shape::kScanWarps);
      mbarrier_init(v_checked + i, Shape::kScanWarps);
    }
    mbarrier_fence_init();
  }
};

// ---- producer --------------------------------------------------------------------------------------------------------------
template <int kD>
__device__ __forceinline__ void copy_queries_and_keys(const HopperForward& f, const ForwardShared<kD>& shared, int64_t block,
                                                      int64_t blocks) {
  using Shape = HopperShape<kD>;
  Ring<Shape::kStages> ring;
  int parity = 0;
  TileWalk walk;
  for (int64_t tile; (tile = walk.tile(block, blocks)), walk.round * blocks < f.order.count; ++walk.round) {
    if (tile >= f.order.count) continue;
    const QueryTile t = query_tile<Shape::kRows, Shape::kKeys>(f.p, f.order, tile);
    if (!t.any() || t.first == t.last) continue;
    const auto copy_block = [&](const TensorMap& map, char* to, Mbarrier* full, Mbarrier* empty, int n) {
      mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
      mbarrier_arrive_expect(full + ring.stage, Shape::kBlockBytes);
#pragma unroll
      for (int i = 0; i < Shape::kPanels; ++i) {
        load_tile(to + ring.stage * Shape::kBlockBytes + i * Shape::kKeys * 128, map, full + ring.stage, 64 * i, t.kv_head,
                  t.k_begin + n * Shape::kKeys, t.batch);
      }
    };
    mbarrier_wait(shared.q_empty, parity ^ 1);
    mbarrier_arrive_expect(shared.q_full, Shape::kQueryBytes);
#pragma unroll
    for (int i = 0; i < Shape::kPanels; ++i) {
      load_tile(shared.q + i * Shape::kRows * 128, f.q, shared.q_full, 64 * i, t.head, t.q_begin + t.q0, t.batch);
    }
    parity ^= 1;
    for (int n = t.last - 1; n >= t.first; --n) {
      copy_block(f.k, shared.k, shared.k_full, shared.k_empty, n);
      copy_block(f.v, shared.v, shared.v_full, shared.v_empty, n);
      ring.step();
    }
  }
}

// One warp's part of a block's values.
template <class T, int kBytes, int kWarps>
__device__ __forceinline__ bool drop_infinite_part(char* block, int warp, int lane) {
  bool found = false;
  for (int at = (warp * 32 + lane) * 16; at < kBytes; at += kWarps * 32 * 16) found |= drop_infinite<T>(block + at);
  return __any_sync(kFullWarp, found);
}

template <class T, int kD>
__device__ __forceinline__ void check_values(const HopperForward& f, const ForwardShared<kD>& shared, int64_t block,
                                             int64_t blocks, int warp, int lane) {
  using Shape = HopperShape<kD>;
  Ring<Shape::kStages> ring;
  TileWalk walk;
  for (int64_t tile; (tile = walk.tile(block, blocks)), walk.round * blocks < f.order.count; ++walk.round) {
    if (tile >= f.order.count) continue;
    const QueryTile t = query_tile<Shape::kRows, Shape::kKeys>(f.p, f.order, tile);
    if (!t.any() || t.first == t.last) continue;
    for (int n = t.last - 1; n >= t.first; --n) {
      mbarrier_wait(shared.v_full + ring.stage, ring.parity);
      if (t.edge(n)) {
        const bool found =
            drop_infinite_part<T, Shape::kBlockBytes, Shape::kScanWarps>(shared.v + ring.stage * Shape::kBlockBytes, warp, lane);
        if (found) fence_async_shared();
        if (lane == 0) shared.repair[4 * ring.stage + warp] = found;
        __syncwarp();
      }
      if (lane == 0) {
        mbarrier_arrive(shared.v_checked + ring.stage);
        mbarrier_arrive(shared.v_empty + ring.stage);
      }
      ring.step();
    }
  }
}

// By the 128 threads of the producer warpgroup.
template <class T, int kD>
__device__ __forceinline__ void forward_producer(const HopperForward& f, char* memory, int thread, int64_t block,
                                                 int64_t blocks) {
  const ForwardShared<kD> shared(memory);
  const int warp = __shfl_sync(kFullWarp, thread / 32, 0), lane = thread % 32;
  if (warp == 0) {
    if (lane == 0) copy_queries_and_keys<kD>(f, shared, block, blocks);
    __syncwarp();
  } else {
    check_values<T, kD>(f, shared, block, blocks, warp - 1, lane);
  }
}

// ---- consumers -------------------------------------------------------------------------------------------------------------
// Rows of the warp whose sums left out values that are not finite: their sum is added to what was stored. A weight is taken to be
// positive; then the sum is the product's result whatever the weight.
template <class T>
__device__ void repair_rows(const Params& p, const QueryTile& t, int row0, int lane) {
  __syncwarp();
  for (int r = row0; r < min(row0 + 16, t.q_len); ++r) {
    const KeyRange keys = keys_of(p, t, r);
    T* out = head_row<T>(p.out, t.batch, int64_t{t.q_begin} + r, t.head);
    for (int n = lane; n < p.head_dim; n += 32) {
      const T* v = head_row<T>(p.v, t.batch, t.k_begin, t.kv_head) + n;
      float sum = 0.0f;
      for (int j = keys.begin; j < keys.end; ++j) {
        const float x = to_acc(v[j * p.v.seq_stride]);
        if (!(fabsf(x) < INFINITY)) sum += x;
      }
      if (sum != 0.0f) out[n] = from_acc<T>(to_acc(out[n]) + sum);
    }
  }
}

// Two rows of each thread: sums become outputs.
template <class T, int kD>
__device__ __forceinline__ void finish_rows(const Params& p, const QueryTile& t, const float (&o)[kD / 2], const RowState& rows,
                                            int row0, int lane) {
  float factor[2];
  bool real[2];
  T* out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(rows.sum[i]);
    factor[i] = sum == 0.0f ? 0.0f : 1.0f / sum;  // no key: 0
    const int r = row0 + lane / 4 + 8 * i;
    real[i] = r < t.q_len;
    out[i] = head_row<T>(p.out, t.batch, int64_t{t.q_begin} + r, t.head);
    if (real[i] && lane % 4 == 0) {
      static_cast<float*>(p.lse)[t.batch * p.lse_batch_stride + t.head * p.lse_head_stride + t.q_begin + r] =
          rows.top[i] * kLn2 + logf(sum);
    }
  }
  store_rows<T, kD>(o, factor, out, real, p.head_dim, lane);
}

// Where the tensor cores go from one warpgroup to the other: barriers kTurn and kTurn + 1, one for each.
template <int kTurn>
struct Turns {
  int warpgroup;
  __device__ __forceinline__ void open() const {
    if (warpgroup == 1) arrive_named(kTurn, 256);
  }
  __device__ __forceinline__ void wait() const { sync_named(kTurn + warpgroup, 256); }
  __device__ __forceinline__ void pass() const { arrive_named(kTurn + 1 - warpgroup, 256); }
  __device__ __forceinline__ void close() const {
    if (warpgroup == 0) wait();
  }
};

// By the 128 threads of consumer warpgroup 0 or 1; both walk over the same tiles.
template <class T, int kD, int kTurn>
__device__ __forceinline__ void forward_consumer(const HopperForward& f, char* memory, int warpgroup, int thread, int64_t block,
                                                 int64_t blocks) {
  using Shape = HopperShape<kD>;
  constexpr int kKeys = Shape::kKeys;
  const ForwardShared<kD> shared(memory);
  const Turns<kTurn> turns{warpgroup};
  const int lane = thread % 32, warp_row = warpgroup * 64 + thread / 32 * 16;
  const uint64_t q_operand = swizzled_operand(shared.q + warpgroup * 64 * 128, 16, 1024);
  const uint64_t k_operand = swizzled_operand(shared.k, 16, 1024);
  const uint64_t v_operand = swizzled_operand(shared.v, kKeys * 128, 1024);
  Ring<Shape::kStages> ring;
  int parity = 0;
  TileWalk walk;
  if constexpr (Shape::kTakeTurns) turns.open();

  for (int64_t tile; (tile = walk.tile(block, blocks)), walk.round * blocks < f.order.count; ++walk.round) {
    if (tile >= f.order.count) continue;
    const QueryTile t = query_tile<Shape::kRows, kKeys>(f.p, f.order, tile);
    if (!t.any()) continue;
    const int row0 = t.q0 + warp_row;
    float s[kKeys / 2], o[kD / 2], factor[2];
    uint32_t weights[kKeys / 16][4];
    RowState rows;
    bool repair = false;
    if (t.first == t.last) {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;
      finish_rows<T, kD>(f.p, t, o, rows, row0, lane);
      continue;
    }

    const auto release = [&](Mbarrier* b) {
      if (lane == 0) mbarrier_arrive(b);
    };
    const auto multiply_keys = [&](int stage) {
      const uint64_t k = operand_at(k_operand, stage * Shape::kBlockBytes);
      hold_registers(s);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) {
        const int at = i % 4 * 32;
        wgmma<T, kKeys, Major::kK, Major::kK>(s, operand_at(q_operand, i / 4 * Shape::kRows * 128 + at),
                                              operand_at(k, i / 4 * kKeys * 128 + at), i > 0);
      }
      wgmma_commit();
    };
    const auto multiply_values = [&](int stage, bool add) {
      const uint64_t v = operand_at(v_operand, stage * Shape::kBlockBytes);
      hold_registers(o);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        wgmma<T, kD, Major::kMN>(o, weights[i], operand_at(v, i * 2048), i > 0 || add);
      }
      wgmma_commit();
    };
    const auto wait_values = [&](const Ring<Shape::kStages>& at, int n) {
      mbarrier_wait(shared.v_full + at.stage, at.parity);
      if (t.edge(n)) {
        mbarrier_wait(shared.v_checked + at.stage, at.parity);
#pragma unroll
        for (int i = 0; i < Shape::kScanWarps; ++i) repair |= shared.repair[4 * at.stage + i] != 0;
      }
    };
    const auto softmax = [&](int n) {
      if (f.score.transform) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] = f.score.apply_approx(s[i]);
      }
      if (t.edge(n)) {
        int begin[2], end[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const KeyRange keys = keys_of(f.p, t, row0 + lane / 4 + 8 * i);
          begin[i] = keys.begin - n * kKeys;
          end[i] = keys.end - n * kKeys;
        }
        mask<kKeys>(s, begin, end, -INFINITY, lane);
      }
      softmax_step<kKeys>(s, rows, factor, f.score.log2_unit);
    };

    mbarrier_wait(shared.q_full, parity);
    parity ^= 1;
    mbarrier_wait(shared.k_full + ring.stage, ring.parity);
    multiply_keys(ring.stage);
    wgmma_wait<0>();
    hold_registers(s);
    release(shared.k_empty + ring.stage);
    softmax(t.last - 1);
    to_operand<T, kKeys>(s, weights);

    for (int n = t.last - 2; n >= t.first; --n) {
      const Ring<Shape::kStages> before = ring;
      ring.step();
      mbarrier_wait(shared.k_full + ring.stage, ring.parity);
      if constexpr (Shape::kTakeTurns) turns.wait();
      multiply_keys(ring.stage);
      wait_values(before, n + 1);
      multiply_values(before.stage, n + 2 < t.last);
      if constexpr (Shape::kTakeTurns) turns.pass();
      wgmma_wait<1>();
      hold_registers(s);
      release(shared.k_empty + ring.stage);
      softmax(n);
      finish_before(rows.sum[0]);  // the softmax runs while the values are multiplied
      finish_before(rows.sum[1]);
      wgmma_wait<0>();
      hold_registers(o);
      release(shared.v_empty + before.stage);
      to_operand<T, kKeys>(s, weights);
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) o[i] *= factor[i / 2 % 2];
    }
    release(shared.q_empty);
    wait_values(ring, t.first);
    multiply_values(ring.stage, t.last - t.first > 1);
    wgmma_wait<0>();
    hold_registers(o);
    release(shared.v_empty + ring.stage);
    ring.step();

    finish_rows<T, kD>(f.p, t, o, rows, row0, lane);
    if (repair) repair_rows<T>(f.p, t, row0, lane);
  }
  if constexpr (Shape::kTakeTurns) turns.close();
}

// ---- kernel ----------------------------------------------------------------------------------------------------------------
template <class T, int kD>
__global__ void __launch_bounds__(HopperShape<kD>::kThreads, 1) hopper_forward(const __grid_constant__ HopperForward f) {
#if FASTLM_HOPPER_BODY
  constexpr int kFirstBarrier = 1;
  char* memory = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), warpgroup = __shfl_sync(kFullWarp, thread / 128, 0);
  if (thread == 0) {
    prefetch_map(f.q);
    prefetch_map(f.k);
    prefetch_map(f.v);
    ForwardShared<kD>(memory).open();
  }
  __syncthreads();
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  if (warpgroup == 0) {
    give_registers<40>();
    forward_producer<T, kD>(f, memory, thread, block, blocks);
  } else {
    take_registers<232>();
    forward_consumer<T, kD, kFirstBarrier>(f, memory, warpgroup - 1, thread % 128, block, blocks);
  }
#else
  __trap();
#endif
}

}  // namespace fastlm::sliding_window_attention::cuda
