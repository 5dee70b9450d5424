// What kernels say to the device beyond plain CUDA: shared memory, asynchronous copies, matrix products of a warp, approximate
// functions. Instructions of sm_80; those of sm_90a stand in hopper.cuh. With FASTLM_EMULATE_CUDA the same kernels compile as
// host code, where emulation/ stands in for the device.
#pragma once

#include <cstdint>

#ifdef FASTLM_EMULATE_CUDA
#include "core/cuda/emulation/device.h"
#endif
#include "core/cuda/element.cuh"

namespace fastlm::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

#ifndef FASTLM_EMULATE_CUDA

// The block's dynamic shared memory, 128-byte aligned (1024 where a launch asks for it: see align_shared). The only shared memory
// kernels use, so that its size is known to the launch.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char fastlm_shared_memory[];
  return fastlm_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// kBytes (4, 8 or 16; both addresses aligned to it) from global to shared memory, in the background. Where `valid` is false
// nothing is read and zeros are written; `from` must still be a pointer, not necessarily one that may be read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t address = shared_address(to);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
  }
}
// Closes the group of copies this thread issued since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread are under way. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, fp32) += a (16x16, row major) b (16x8, column major); T is bfloat16 or float16. Fragments as in the PTX manual:
// lane = 4 g + c holds d[0..1] = D[g][2c..], d[2..3] = D[g+8][2c..]; a[0] = A[g][2c..], a[1] = A[g+8][2c..], a[2] = A[g][2c+8..],
// a[3] = A[g+8][2c+8..]; b[0] = B[2c..][g], b[1] = B[2c+8..][g].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(DTypeOf<T>::value == DType::kFloat16);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// bar.sync with a number from 1 to 15, for `threads` threads (a multiple of 32) of the block.
__device__ __forceinline__ void sync_named(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_named(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// 2^x, relative error 2^-22 or so; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 8 or 16 bytes of registers to global memory, aligned to as much, by one instruction. An assignment of a uint4 is cut into four
// stores where the same address is also used in another way; where it is not, it leaves the compiler more freedom.
template <int kBytes>
__device__ __forceinline__ void store_words(void* to, const uint32_t* word) {
  static_assert(kBytes == 8 || kBytes == 16);
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
  }
}

// A volatile read of global memory another block writes, and the fences around it.
__device__ __forceinline__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void add_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Called in loops that wait for another thread.
__device__ __forceinline__ void pause() { __nanosleep(20); }
// Brings the line at p, which must be readable, into the second-level cache.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#endif

// Threads of a block that work together on one tile, of which a block may hold several kinds side by side. What computes a tile
// takes its Team, counts threads and waits by it, and never names threadIdx or __syncthreads.
template <int kSize>
struct Team {
  static_assert(kSize % 32 == 0);
  static constexpr int kThreads = kSize;
  int thread;   // 0 to kSize - 1
  int barrier;  // 1 to 15, one for each team of a block
  __device__ __forceinline__ void sync() const { sync_named(barrier, kSize); }
};

// Two elements as one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return static_cast<uint32_t>(from_acc<T>(low).bits) | static_cast<uint32_t>(from_acc<T>(high).bits) << 16;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

}  // namespace fastlm::cuda
