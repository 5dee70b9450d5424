// The device's words on the host: what core/cuda/device.cuh offers and the few built-in functions that kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/cuda/emulation/run.h"
#include "core/dtypes.h"

// ---- built-in functions -------------------------------------------------------------------------------------------------
static inline void __syncthreads() { fastlm::cuda::emulation::barrier(0, 0, true); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

static inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
static inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
static inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
static inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
static inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}

template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return std::min<C>(a, b);
}
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return std::max<C>(a, b);
}

template <class T, class U>
static inline T atomicAdd(T* p, U x) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on their order");
  const T before = *p;
  *p = static_cast<T>(before + static_cast<T>(x));
  fastlm::cuda::emulation::progress();
  return before;
}
template <class T, class U>
static inline T atomicExch(T* p, U x) {
  const T before = *p;
  *p = static_cast<T>(x);
  fastlm::cuda::emulation::progress();
  return before;
}

namespace fastlm::cuda::emulation {

template <class T>
struct Shuffle {
  T value;
  int source;  // lane
  T result;
};

template <class T>
void combine_shuffle(void** payloads) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* p = static_cast<Shuffle<T>*>(payloads[lane]);
    if (p == nullptr) continue;
    const auto* from = static_cast<const Shuffle<T>*>(payloads[p->source]);
    if (from == nullptr) fail("lane %d reads lane %d, which is not in the mask", lane, p->source);
    p->result = from->value;
  }
}

inline int lane_index() { return static_cast<int>(position.thread.x % 32); }

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  Shuffle<T> p{value, source, value};
  exchange(mask, &p, combine_shuffle<T>);
  return p.result;
}

struct Vote {
  bool yes;
  uint32_t result;
};
inline void combine_vote(void** payloads) {
  uint32_t all = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const auto* p = static_cast<const Vote*>(payloads[lane]);
    if (p != nullptr && p->yes) all |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (payloads[lane] != nullptr) static_cast<Vote*>(payloads[lane])->result = all;
  }
}

inline void combine_nothing(void**) {}

}  // namespace fastlm::cuda::emulation

static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  fastlm::cuda::emulation::exchange(mask, &nothing, fastlm::cuda::emulation::combine_nothing);
}
static inline uint32_t __ballot_sync(uint32_t mask, bool yes) {
  fastlm::cuda::emulation::Vote p{yes, 0};
  fastlm::cuda::emulation::exchange(mask, &p, fastlm::cuda::emulation::combine_vote);
  return p.result;
}
static inline bool __any_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
static inline bool __all_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, !yes) == 0; }
// `width` cuts the warp into parts, as on the device; a lane without a source keeps its own value.
template <class T>
static inline T __shfl_sync(uint32_t mask, T x, int source, int width = 32) {
  const int lane = fastlm::cuda::emulation::lane_index();
  return fastlm::cuda::emulation::shuffle(mask, x, lane / width * width + (source & (width - 1)));
}
template <class T>
static inline T __shfl_xor_sync(uint32_t mask, T x, int distance, int width = 32) {
  const int lane = fastlm::cuda::emulation::lane_index(), source = lane ^ distance;
  return fastlm::cuda::emulation::shuffle(mask, x, source / width > lane / width ? lane : source);
}
template <class T>
static inline T __shfl_up_sync(uint32_t mask, T x, int distance, int width = 32) {
  const int lane = fastlm::cuda::emulation::lane_index();
  return fastlm::cuda::emulation::shuffle(mask, x, lane % width >= distance ? lane - distance : lane);
}
template <class T>
static inline T __shfl_down_sync(uint32_t mask, T x, int distance, int width = 32) {
  const int lane = fastlm::cuda::emulation::lane_index();
  return fastlm::cuda::emulation::shuffle(mask, x, lane % width + distance < width ? lane + distance : lane);
}

// ---- the functions of device.cuh -------------------------------------------------------------------------------------------
namespace fastlm::cuda {

inline char* shared_memory() { return emulation::shared_memory(); }

namespace emulation {

inline void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const char* address = static_cast<const char*>(p);
  if (address < shared_memory() || address + bytes > shared_memory() + shared_bytes()) {
    fail("%s: address %td lies outside of the shared memory (%zu bytes)", what, address - shared_memory(), shared_bytes());
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("%s: the shared address is not aligned to %zu", what, alignment);
}

}  // namespace emulation

template <int kBytes>
void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::check_shared(to, kBytes, kBytes, "copy_async");
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0)
    emulation::fail("copy_async: the global address is not aligned to %d", kBytes);
  std::memset(to, 0xff, kBytes);  // not to be read before the wait
  emulation::in_background([=] { valid ? std::memcpy(to, from, kBytes) : std::memset(to, 0, kBytes); });
}
inline void commit_copies() { emulation::close_group(); }
template <int kPending>
void wait_copies() {
  emulation::wait_groups(kPending);
}

namespace emulation {

struct MatrixLoad {
  const void* row;
  uint32_t* r;
};

// Register i of lane 4 g + c is row g, elements 2 c and 2 c + 1 of matrix i (transposed: column g, rows 2 c and 2 c + 1).
template <bool kTransposed>
void combine_load_matrix(void** payloads) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = kTransposed ? 2 * c + k : g, column = kTransposed ? g : 2 * c + k;
        std::memcpy(&pair[k], static_cast<const char*>(static_cast<MatrixLoad*>(payloads[8 * i + row])->row) + 2 * column, 2);
      }
      static_cast<MatrixLoad*>(payloads[lane])->r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

template <bool kTransposed>
void load_matrix(uint32_t (&r)[4], const void* row) {
  check_shared(row, 16, 16, "load_matrix_x4");
  MatrixLoad p{row, r};
  exchange(0xffffffffu, &p, combine_load_matrix<kTransposed>);
}

inline float element_value(uint16_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 31  ? (fraction ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits >> 15 ? -x : x;
}
inline float low_value(uint32_t pair, DType dtype) { return element_value(static_cast<uint16_t>(pair), dtype); }
inline float high_value(uint32_t pair, DType dtype) { return element_value(static_cast<uint16_t>(pair >> 16), dtype); }

struct MatrixProduct {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <DType kDType>
void combine_mma(void** payloads) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* p = static_cast<const MatrixProduct*>(payloads[lane]);
    const int g = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = 2 * c + i / 2 * 8;
      a[row][column] = low_value(p->a[i], kDType);
      a[row][column + 1] = high_value(p->a[i], kDType);
      d[g + i / 2 * 8][2 * c + i % 2] = p->d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * c + 8 * i][g] = low_value(p->b[i], kDType);
      b[2 * c + 8 * i + 1][g] = high_value(p->b[i], kDType);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* p = static_cast<MatrixProduct*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) p->d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

}  // namespace emulation

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emulation::load_matrix<false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulation::load_matrix<true>(r, row); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixProduct p{d, a, {b0, b1}};
  emulation::exchange(0xffffffffu, &p, emulation::combine_mma<DTypeOf<T>::value>);
}

inline void sync_named(int number, int threads) { emulation::barrier(number, threads, true); }
inline void arrive_named(int number, int threads) { emulation::barrier(number, threads, false); }

// The approximate functions are exact here but for what they do to tiny results.
inline float flush_tiny(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush_tiny(std::exp2(x)); }
inline float log2_approx(float x) { return std::log2(flush_tiny(x)); }
inline float rcp_approx(float x) { return flush_tiny(1.0f / x); }

template <int kBytes>
void store_words(void* to, const uint32_t* word) {
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0) emulation::fail("store_words: the address is not aligned to %d", kBytes);
  std::memcpy(to, word, kBytes);
}

inline int load_acquire(const int* p) { return *static_cast<const volatile int*>(p); }
inline void add_release(int* p, int x) {
  *p += x;
  emulation::progress();
}
inline void pause() { emulation::yield(); }
inline void prefetch_l2(const void*) {}

}  // namespace fastlm::cuda
