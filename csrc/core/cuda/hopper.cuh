// The device's words that sm_90a adds: barriers in shared memory (mbarrier), copies of whole tiles (TMA), matrix products of a
// warpgroup of 128 threads (wgmma), registers moved between warpgroups. The wgmma instructions themselves, whose operand lists
// run to 130 registers, come from CUTLASS's arch headers; FASTLM_HOPPER_KERNELS says that those are there. With
// FASTLM_EMULATE_CUDA emulation/hopper.h stands in for all of it.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/tensor_map.h"

#if !defined(FASTLM_EMULATE_CUDA)
#include <cute/arch/mma_sm90_gmma.hpp>

#include <utility>
#endif

// True where the instructions of sm_90a may be used; elsewhere a kernel traps: the host must not have started it.
#if defined(FASTLM_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLM_HOPPER_BODY 1
#else
#define FASTLM_HOPPER_BODY 0
#endif

namespace fastlm::cuda {

// How the rows of an operand of wgmma lie in shared memory: K-major: the 16 steps of the inner dimension are contiguous;
// MN-major: the rows (of A) or columns (of B) are.
enum class Major { kK = 0, kMN = 1 };

// A 64-bit word that counts arrivals and bytes; a phase ends when all of both have come.
using Mbarrier = uint64_t;

}  // namespace fastlm::cuda

#ifdef FASTLM_EMULATE_CUDA
#include "core/cuda/emulation/hopper.h"
#else

namespace fastlm::cuda {

// ---- barriers in shared memory ---------------------------------------------------------------------------------------------
__device__ __forceinline__ void mbarrier_init(Mbarrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After the inits, by the thread that did them, and before a barrier of the block.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// One arrival that also announces `bytes` of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Waits for the end of the current phase if its parity is `parity`, of the one before otherwise: phases are 0, 1, 0, ...; a
// barrier that no phase of which has ended counts as having ended one of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// ---- clusters: blocks that see each other's shared memory (launch_clusters) ------------------------------------------------
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// By all threads of all blocks. After the mbarriers' inits, and before a block ends that others may still write to.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// An arrival at the barrier that lies where b lies here, in block `rank`. It orders what products and tile copies did; for stores
// of threads it would have to say .release.cluster, which costs a fence of the whole device.
// Threads with `arrive` only, by a predicate: a branch would end the warp's uniform code.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* b, int rank, bool arrive) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      ".reg .pred arrive;\n"
      "setp.ne.s32 arrive, %2, 0;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "@arrive mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(rank), "r"(static_cast<int>(arrive))
      : "memory");
}

// ---- copies of tiles -------------------------------------------------------------------------------------------------------
// Makes this thread's writes to shared memory visible to tile copies and wgmma.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory that tile copies of other blocks touched or will touch.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// The box of `map` at (c0, c1, c2, c3), innermost first, to shared memory; its bytes arrive at `b`. Outside of the tensor: zeros.
__device__ __forceinline__ void load_tile(void* to, const TensorMap& map, Mbarrier* b, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same to this place in every block of the cluster whose bit is set in `mask`; each block's bytes arrive at its own barrier.
__device__ __forceinline__ void load_tile_to_blocks(void* to, const TensorMap& map, Mbarrier* b, uint32_t mask, int c0, int c1,
                                                    int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "h"(static_cast<uint16_t>(mask))
      : "memory");
}
// `bytes` (a multiple of 16, both addresses too) of shared to global memory, or added to the floats there; of this thread's
// group.
__device__ __forceinline__ void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(reinterpret_cast<uint64_t>(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void add_bulk(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(reinterpret_cast<uint64_t>(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all bulk groups of this thread are done, their writes included.
__device__ __forceinline__ void wait_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- registers -------------------------------------------------------------------------------------------------------------
// By all threads of a warpgroup; a multiple of 8 from 24 to 256.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- matrix products -------------------------------------------------------------------------------------------------------
// Before the first product, and after other instructions wrote registers that products read or add to.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are under way. The registers of a group belong to it until then.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of these registers over this place.
template <int kCount>
__device__ __forceinline__ void hold_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps the assembler, which sees nothing of hold_registers, from moving what x depends on below this place, as it likes to with
// a wait that follows. x is not negative in the cases that matter: a negative one costs a moment of sleep.
__device__ __forceinline__ void finish_before(float x) {
  asm volatile("{\n.reg .pred negative;\nsetp.lt.f32 negative, %0, 0f00000000;\n@negative nanosleep.u32 1;\n}\n" ::"f"(x)
               : "memory");
}

namespace detail {

template <class T, int kN>
struct Wgmma;
#define FASTLM_WGMMA(N)                                                                                 \
  template <>                                                                                           \
  struct Wgmma<bfloat16, N> {                                                                           \
    template <cute::SM90::GMMA::Major kA, cute::SM90::GMMA::Major kB>                                   \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kA, kB>;                            \
    template <cute::SM90::GMMA::Major kB>                                                               \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, kB>; \
  };                                                                                                    \
  template <>                                                                                           \
  struct Wgmma<float16, N> {                                                                            \
    template <cute::SM90::GMMA::Major kA, cute::SM90::GMMA::Major kB>                                   \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<kA, kB>;                              \
    template <cute::SM90::GMMA::Major kB>                                                               \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, kB>;   \
  };
FASTLM_WGMMA(64)
FASTLM_WGMMA(128)
FASTLM_WGMMA(256)
#undef FASTLM_WGMMA

constexpr cute::SM90::GMMA::Major cute_major(Major m) { return static_cast<cute::SM90::GMMA::Major>(m); }

template <class Op, int kCount, size_t... kI>
__device__ __forceinline__ void wgmma_shared(float (&d)[kCount], uint64_t a, uint64_t b, bool add, std::index_sequence<kI...>) {
  Op::fma(a, b, d[kI]..., static_cast<cute::SM90::GMMA::ScaleOut>(add));
}
template <class Op, int kCount, size_t... kI>
__device__ __forceinline__ void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add,
                                                std::index_sequence<kI...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[kI]..., static_cast<cute::SM90::GMMA::ScaleOut>(add));
}

}  // namespace detail

// d (64 x kN, fp32) = a (64 x 16) b (16 x kN), added to d where `add`; both from shared memory, by descriptors (below). Thread
// 32 w + 4 g + c of the warpgroup holds d[4 j + 2 i + k] = D[16 w + 8 i + g][8 j + 2 c + k].
template <class T, int kN, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  using Op = typename detail::Wgmma<T, kN>::template Shared<detail::cute_major(kA), detail::cute_major(kB)>;
  detail::wgmma_shared<Op>(d, a, b, add, std::make_index_sequence<kN / 2>{});
}
// The same with a in registers: a[i + 2 k] is the pair A[16 w + 8 i + g][8 k + 2 c ..].
template <class T, int kN, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  using Op = typename detail::Wgmma<T, kN>::template Registers<detail::cute_major(kB)>;
  detail::wgmma_registers<Op>(d, a, b, add, std::make_index_sequence<kN / 2>{});
}

}  // namespace fastlm::cuda

#endif

namespace fastlm::cuda {

// The descriptor of an operand in shared memory with the swizzle of 128 bytes: rows of 128 bytes, in groups of eight (1024 bytes,
// aligned), within which the 16-byte pieces of row r are permuted by exclusive or with r.
//   K-major:  rows are M or N, a row holds 64 inner steps; groups of eight rows lie `stride` bytes apart. `leading` is not used.
//             Inner step k0 (a multiple of 16, below 64) starts 2 k0 bytes after the tile's start.
//   MN-major: rows are inner steps, a row holds 64 of M or N; groups of eight inner steps lie `stride`, the next 64 of M or N
//             `leading` bytes apart.
__device__ __forceinline__ uint64_t swizzled_operand(const void* tile, int leading, int stride) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffffu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}
// `bytes` further in the same tile; what descriptors hold of an address does not overflow into other fields.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}

// Where the 16-byte piece `piece` (0 to 7) of row `row` lies in a swizzled tile whose start is aligned to 1024 bytes.
__device__ __forceinline__ int swizzled_offset(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

}  // namespace fastlm::cuda
