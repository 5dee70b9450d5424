// What hopper.cuh offers, on the emulated device. As on the device: products and tile copies happen at the latest moment a kernel
// may rely on (products read shared memory when they are waited for, copies when somebody waits at their barrier), operands of
// products are found by decoding their descriptors (all swizzles and both majors, as in PTX's "matrix descriptor" and the
// canonical layouts of CUTLASS's mma_traits_sm90_gmma.hpp), swizzles act on addresses, the four warps of a warpgroup are
// not in step. Until they are waited for, destinations hold NaN. Not modelled: that writes of threads need a fence before copies
// and products see them.
#pragma once

#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/cuda/emulation/device.h"
#include "core/cuda/tensor_map.h"

namespace fastlm::cuda {

// Addresses as instructions see them: offsets in the block's shared memory.
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulation::shared_memory());
}

namespace emulation {

// ---- barriers in shared memory: the state lies in the 64 bits themselves, so that use before the init is found --------------
struct MbarrierState {
  uint16_t expected, pending;
  int32_t bytes : 23;  // announced minus arrived
  uint32_t phase : 1;
  uint32_t mark : 8;
};
static_assert(sizeof(MbarrierState) == sizeof(Mbarrier));
constexpr uint32_t kMbarrierMark = 0x5a;

// Where what lies at p in this block lies in that of number `rank` of the cluster.
template <class T>
T* in_block(T* p, unsigned int rank) {
  return reinterpret_cast<T*>(shared_memory_of(rank) + shared_address(p));
}
inline MbarrierState& initialized(Mbarrier* b) {
  auto& state = *reinterpret_cast<MbarrierState*>(b);
  if (state.mark != kMbarrierMark) fail("an mbarrier is used before its init, or was overwritten");
  return state;
}
inline MbarrierState& mbarrier_state(Mbarrier* b) {
  check_shared(b, 8, 8, "an mbarrier");
  return initialized(b);
}
inline void mbarrier_update(MbarrierState& state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
  }
  progress();
}
inline void mbarrier_arrival(MbarrierState& state) {
  if (state.pending == 0) fail("an mbarrier gets more arrivals in a phase than its init said (%d)", state.expected);
  --state.pending;
  mbarrier_update(state);
}

// Copies under way, by the barrier at which they arrive.
struct TileCopies {
  std::unordered_map<Mbarrier*, std::vector<std::function<void()>>> by_barrier;
};
inline TileCopies& tile_copies() {
  static thread_local TileCopies copies;
  return copies;
}
// Lets one copy of this barrier arrive. Called when nothing else happened since the last look: copies are late.
inline void advance_copies(Mbarrier* b) {
  auto& all = tile_copies().by_barrier;
  const auto found = all.find(b);
  if (found == all.end()) return;
  found->second.front()();
  found->second.erase(found->second.begin());
  if (found->second.empty()) all.erase(found);
}

// The swizzle of 32, 64 or 128 bytes (bits 1 to 3): bits 4.. of an address change with bits 7..
inline uint32_t swizzled_address(uint32_t address, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

inline void copy_box(char* shared, uint32_t to, const TensorShape& t, const int (&at)[4]) {
  uint32_t row = 0;
  for (int i3 = 0; i3 < t.box[3]; ++i3) {
    for (int i2 = 0; i2 < t.box[2]; ++i2) {
      for (int i1 = 0; i1 < t.box[1]; ++i1, ++row) {
        const int64_t c1 = int64_t{at[1]} + i1, c2 = int64_t{at[2]} + i2, c3 = int64_t{at[3]} + i3;
        const bool inside = c1 >= 0 && c1 < t.size[1] && c2 >= 0 && c2 < t.size[2] && c3 >= 0 && c3 < t.size[3];
        const char* from = static_cast<const char*>(t.ptr) + c1 * t.stride[0] + c2 * t.stride[1] + c3 * t.stride[2];
        for (int i0 = 0; i0 < t.box[0]; ++i0) {
          const int64_t c0 = int64_t{at[0]} + i0;
          uint16_t x = 0;
          if (inside && c0 >= 0 && c0 < t.size[0]) std::memcpy(&x, from + 2 * c0, 2);
          const uint32_t address = swizzled_address(to + row * 128 + 2 * static_cast<uint32_t>(i0), 3);
          std::memcpy(shared + address, &x, 2);
        }
      }
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------------
// An operand in shared memory. A descriptor holds addresses and distances in units of 16 bytes, 14 bits each.
struct Operand {
  uint32_t start, leading, stride;
  int bits;  // of the swizzle

  explicit Operand(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    static constexpr int kBits[4] = {0, 3, 2, 1};
    bits = kBits[descriptor >> 62];
    if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset is not modelled");
  }

  // Of element (mn, k) with k below 16.
  uint32_t address(Major major, uint32_t mn, uint32_t k) const {
    const uint32_t row_bytes = 16u << bits, row_elements = row_bytes / 2;
    uint32_t offset = 0;
    if (major == Major::kK) {
      offset = mn / 8 * stride + mn % 8 * row_bytes + k % 8 * 2 + k / 8 * (bits == 0 ? leading : 16);
    } else if (bits == 0) {
      offset = mn / 8 * stride + mn % 8 * 2 + k % 8 * row_bytes + k / 8 * leading;
    } else {
      offset = mn / row_elements * leading + mn % row_elements * 2 + k % 8 * row_bytes + k / 8 * stride;
    }
    return swizzled_address(start + offset, bits);
  }

  float value(char* shared, Major major, uint32_t mn, uint32_t k, DType dtype) const {
    uint16_t x;
    const char* from = shared + address(major, mn, k);
    check_shared(from, 2, 2, "wgmma");
    std::memcpy(&x, from, 2);
    return element_value(x, dtype);
  }
};

// One product as one warp sees it: 16 of the 64 rows.
struct Product {
  int columns;
  DType dtype;
  Major a_major, b_major;
  bool add, a_in_registers;
  uint64_t a, b;
  float* d[32];
  const uint32_t* registers[32];
  std::vector<float> before;  // of d, which holds NaN meanwhile; empty: what the product before left there

  void run(char* shared, uint32_t warp) {
    const auto n = static_cast<size_t>(columns);
    const size_t count = n / 2;
    if (!before.empty()) {
      for (size_t lane = 0; lane < 32; ++lane) std::memcpy(d[lane], &before[lane * count], count * sizeof(float));
    }
    float x[16][16];
    for (uint32_t i = 0; i < 16; ++i) {
      for (uint32_t k = 0; k < 16; ++k) {
        if (a_in_registers) {
          const uint32_t pair = registers[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2];
          x[i][k] = k % 2 == 0 ? low_value(pair, dtype) : high_value(pair, dtype);
        } else {
          x[i][k] = Operand(a).value(shared, a_major, warp % 4 * 16 + i, k, dtype);
        }
      }
    }
    std::vector<float> y(16 * n), sum(n);
    const Operand operand(b);
    for (uint32_t j = 0; j < n; ++j) {
      for (uint32_t k = 0; k < 16; ++k) y[k * n + j] = operand.value(shared, b_major, j, k, dtype);
    }
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < n; ++j) sum[j] = add ? d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2] : 0.0f;
      for (size_t k = 0; k < 16; ++k) {
        for (size_t j = 0; j < n; ++j) sum[j] += x[i][k] * y[k * n + j];
      }
      for (size_t j = 0; j < n; ++j) d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2] = sum[j];
    }
  }
};

struct WarpProducts {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  bool fenced = false;
};
inline WarpProducts& warp_products() {
  static thread_local std::unordered_map<const char*, WarpProducts> all;
  return all[shared_memory() + position.thread.x / 32];
}

inline void combine_product(void** payloads) {
  WarpProducts& warp = warp_products();
  if (!warp.fenced) fail("wgmma without a wgmma_fence after registers may have changed");
  Product p = *static_cast<const Product*>(payloads[0]);
  for (int lane = 0; lane < 32; ++lane) {
    const auto* other = static_cast<const Product*>(payloads[lane]);
    if (other->columns != p.columns || other->a_in_registers != p.a_in_registers || other->b != p.b || other->add != p.add ||
        (!p.a_in_registers && other->a != p.a)) {
      fail("wgmma: the lanes of a warp disagree about descriptors or shapes");
    }
    p.d[lane] = other->d[0];
    p.registers[lane] = other->registers[0];
  }
  bool pending = false;
  for (const Product& q : warp.open) pending |= q.d[0] == p.d[0];
  for (const auto& group : warp.groups) {
    for (const Product& q : group) pending |= q.d[0] == p.d[0];
  }
  if (!pending) {
    const auto count = static_cast<size_t>(p.columns / 2);
    p.before.resize(32 * count);
    for (size_t lane = 0; lane < 32; ++lane) {
      std::memcpy(&p.before[lane * count], p.d[lane], count * sizeof(float));
      std::memset(p.d[lane], 0xff, count * sizeof(float));
    }
  }
  warp.open.push_back(std::move(p));
}
inline void combine_wgmma_fence(void**) { warp_products().fenced = true; }
inline void combine_commit(void**) {
  WarpProducts& warp = warp_products();
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}
template <int kPending>
void combine_wgmma_wait(void**) {
  WarpProducts& warp = warp_products();
  if (!warp.open.empty()) fail("wgmma_wait before the wgmma_commit of the products issued last");
  while (warp.groups.size() > kPending) {
    for (Product& p : warp.groups.front()) p.run(shared_memory(), position.thread.x / 32);
    warp.groups.erase(warp.groups.begin());
  }
  warp.fenced = false;
}
inline void whole_warp(Combine combine) {
  int nothing = 0;
  exchange(0xffffffffu, &nothing, combine);
}

template <int kCount>
void combine_registers(void**) {}

}  // namespace emulation

// ---- the functions of hopper.cuh -------------------------------------------------------------------------------------------
inline void mbarrier_init(Mbarrier* b, int arrivals) {
  emulation::check_shared(b, 8, 8, "an mbarrier");
  const emulation::MbarrierState state{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0,
                                       emulation::kMbarrierMark};
  std::memcpy(b, &state, sizeof(state));
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(Mbarrier* b) { emulation::mbarrier_arrival(emulation::mbarrier_state(b)); }
inline void mbarrier_arrive_expect(Mbarrier* b, int bytes) {
  auto& state = emulation::mbarrier_state(b);
  state.bytes += bytes;
  emulation::mbarrier_arrival(state);
}
inline void mbarrier_wait(Mbarrier* b, int parity) {
  if (parity != 0 && parity != 1) emulation::fail("an mbarrier has no phase of parity %d", parity);
  uint64_t before = emulation::progress_so_far();
  while (emulation::mbarrier_state(b).phase == static_cast<uint32_t>(parity)) {
    emulation::yield();
    if (emulation::progress_so_far() == before) emulation::advance_copies(b);
    before = emulation::progress_so_far();
  }
}

inline int cluster_rank() { return static_cast<int>(emulation::cluster_rank()); }
inline void cluster_sync() { emulation::cluster_barrier(); }
inline void mbarrier_arrive_at(Mbarrier* b, int rank, bool arrive) {
  if (!arrive) return;
  emulation::check_shared(b, 8, 8, "an mbarrier");
  emulation::mbarrier_arrival(emulation::initialized(emulation::in_block(b, static_cast<unsigned int>(rank))));
}

inline void fence_async_shared() {}
inline void fence_async_global() {}
inline void prefetch_map(const TensorMap&) {}

// To the same place of every block in `mask`, whose own barrier there gets the bytes.
inline void load_tile_to_blocks(void* to, const TensorMap& map, Mbarrier* b, uint32_t mask, int c0, int c1, int c2, int c3) {
  using namespace emulation;
  const TensorShape shape = map.shape;
  const int bytes = 2 * shape.box[0] * shape.box[1] * shape.box[2] * shape.box[3];
  if (shape.box[0] != 64) fail("load_tile: %d elements do not fill the 128 bytes of a swizzled row", shape.box[0]);
  check_shared(to, static_cast<size_t>(bytes), 128, "load_tile");
  check_shared(b, 8, 8, "an mbarrier");
  const uint32_t address = shared_address(to);
  for (unsigned int rank = 0; mask >> rank != 0; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    char* const shared = shared_memory_of(rank);
    Mbarrier* const arrives_at = in_block(b, rank);
    initialized(arrives_at);
    std::memset(shared + address, 0xff, static_cast<size_t>(bytes));
    tile_copies().by_barrier[arrives_at].push_back([=] {
      const int at[4] = {c0, c1, c2, c3};
      copy_box(shared, address, shape, at);
      auto& state = initialized(arrives_at);
      state.bytes -= bytes;
      mbarrier_update(state);
    });
  }
  progress();
}
inline void load_tile(void* to, const TensorMap& map, Mbarrier* b, int c0, int c1, int c2, int c3) {
  load_tile_to_blocks(to, map, b, 1u << emulation::cluster_rank(), c0, c1, c2, c3);
}

inline void check_bulk(const void* to, const void* from, int bytes) {
  emulation::check_shared(from, static_cast<size_t>(bytes), 16, "a bulk copy");
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || bytes <= 0 || bytes % 16 != 0) {
    emulation::fail("a bulk copy needs a global address and a size that are multiples of 16");
  }
}
inline void store_bulk(void* to, const void* from, int bytes) {
  check_bulk(to, from, bytes);
  emulation::in_background([=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}
inline void add_bulk(float* to, const float* from, int bytes) {
  check_bulk(to, from, bytes);
  emulation::in_background([=] {
    for (int i = 0; i < bytes / 4; ++i) to[i] += from[i];
  });
}
inline void commit_bulk() { emulation::close_group(); }
inline void wait_bulk() { emulation::wait_groups(0); }

template <int kCount>
void give_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulation::whole_warp(emulation::combine_registers<kCount>);
}
template <int kCount>
void take_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulation::whole_warp(emulation::combine_registers<kCount>);
}

inline void wgmma_fence() { emulation::whole_warp(emulation::combine_wgmma_fence); }
inline void wgmma_commit() { emulation::whole_warp(emulation::combine_commit); }
template <int kPending>
void wgmma_wait() {
  emulation::whole_warp(emulation::combine_wgmma_wait<kPending>);
}
template <int kCount>
void hold_registers(float (&)[kCount]) {}
inline void finish_before(float) {}

template <class T, int kN, Major kA, Major kB>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  emulation::Product p{kN, DTypeOf<T>::value, kA, kB, add, false, a, b, {d}, {}, {}};
  emulation::exchange(0xffffffffu, &p, emulation::combine_product);
}
template <class T, int kN, Major kB>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  emulation::Product p{kN, DTypeOf<T>::value, Major::kK, kB, add, true, 0, b, {d}, {a}, {}};
  emulation::exchange(0xffffffffu, &p, emulation::combine_product);
}

}  // namespace fastlm::cuda
