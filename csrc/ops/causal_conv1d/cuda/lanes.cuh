// What one thread holds of a row: kLanes channels next to each other, moved by one load of 8 or 16 bytes, or a single channel
// with any stride. And the filter's taps and sums of these channels: in registers where the width is a constant, else as a column
// of shared memory.
#pragma once

#include <type_traits>

#include "core/cuda/device.cuh"
#include "ops/causal_conv1d/params.h"

namespace fastlm::causal_conv1d::cuda {

using fastlm::cuda::from_acc;
using fastlm::cuda::load_param;
using fastlm::cuda::to_acc;

// kBytes (4, 8 or a multiple of 16) of memory as registers; the address is a multiple of min(kBytes, 16).
template <int kBytes>
struct Words {
  static constexpr int kCount = kBytes / 4;
  uint32_t word[kCount];

  // Memory that the kernel does not write.
  __device__ __forceinline__ void load(const void* p) {
    load_with(p, [](const auto* q) { return __ldg(q); });
  }
  // Memory that this thread writes afterwards.
  __device__ __forceinline__ void load_state(const void* p) {
    load_with(p, [](const auto* q) { return *q; });
  }
  template <class Load>
  __device__ __forceinline__ void load_with(const void* p, Load load_one) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 v = load_one(static_cast<const uint4*>(p) + i);
        word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
      }
    } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 8; ++i) {
        const uint2 v = load_one(static_cast<const uint2*>(p) + i);
        word[2 * i] = v.x, word[2 * i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) word[i] = load_one(static_cast<const uint32_t*>(p) + i);
    }
  }
  __device__ __forceinline__ void store(void* p) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        static_cast<uint4*>(p)[i] = uint4{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]};
      }
    } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 8; ++i) static_cast<uint2*>(p)[i] = uint2{word[2 * i], word[2 * i + 1]};
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) static_cast<uint32_t*>(p)[i] = word[i];
    }
  }
  // The same where the compiler would cut the assignments: another path stores to the same address element by element.
  __device__ __forceinline__ void store_whole(void* p) const {
    constexpr int kOnce = kBytes % 16 == 0 ? 16 : 8;
#pragma unroll
    for (int i = 0; i < kBytes / kOnce; ++i) {
      fastlm::cuda::store_words<kOnce>(static_cast<char*>(p) + i * kOnce, word + i * kOnce / 4);
    }
  }
};

// kLanes elements as they lie in memory.
template <class T, int kLanes>
struct Elements {
  Words<kLanes* static_cast<int>(sizeof(T))> words;

  __device__ __forceinline__ void load(const T* p) { words.load(p); }
  __device__ __forceinline__ void store(T* p) const { words.store(p); }
  __device__ __forceinline__ acc_t<T> get(int i) const {
    if constexpr (sizeof(T) == 2) {
      return to_acc(T{static_cast<uint16_t>(i % 2 == 0 ? words.word[i / 2] : words.word[i / 2] >> 16)});
    } else {
      return __uint_as_float(words.word[i]);
    }
  }
  __device__ __forceinline__ void set(const acc_t<T> (&v)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (sizeof(T) == 2) {
        if (i % 2 == 0) words.word[i / 2] = fastlm::cuda::pack_pair<T>(v[i], v[i + 1]);
      } else {
        words.word[i] = __float_as_uint(v[i]);
      }
    }
  }
};
template <class T>
struct Elements<T, 1> {
  T element;

  __device__ __forceinline__ void load(const T* p) { element = *p; }
  __device__ __forceinline__ void store(T* p) const { *p = element; }
  __device__ __forceinline__ acc_t<T> get(int) const { return to_acc(element); }
  __device__ __forceinline__ void set(const acc_t<T> (&v)[1]) { element = from_acc<T>(v[0]); }
};

// kCount elements of D at p as A; p is aligned as Words asks for.
template <class D, class A, int kCount>
__device__ __forceinline__ void load_converted(const void* p, int64_t first, A (&out)[kCount]) {
  const D* from = static_cast<const D*>(p) + first;
  if constexpr (sizeof(D) == 8) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<A>(from[i]);
  } else {
    Elements<D, kCount> raw;
    raw.load(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<A>(raw.get(i));
  }
}
template <class A, int kCount>
__device__ __forceinline__ void load_params(const void* p, DType dtype, int64_t first, A (&out)[kCount]) {
  switch (dtype) {
    case DType::kFloat32:
      return load_converted<float>(p, first, out);
    case DType::kBFloat16:
      return load_converted<bfloat16>(p, first, out);
    case DType::kFloat16:
      return load_converted<float16>(p, first, out);
    case DType::kFloat64:
      return load_converted<double>(p, first, out);
  }
}

// kRows values for each of a thread's lanes.
template <class A, int kRows, int kLanes>
struct Registers {
  A value[kRows][kLanes];
  __device__ __forceinline__ A& operator()(int j, int lane) { return value[j][lane]; }
};
// The same for one lane and a number of rows known at run time: a column of shared memory as wide as the block.
template <class A, int kThreads>
struct Column {
  A* value;
  __device__ __forceinline__ A& operator()(int j, int) { return value[j * kThreads]; }
};
template <class A, int kWidth, int kRows, int kLanes, int kThreads>
using Taps = std::conditional_t<(kWidth > 0), Registers<A, kRows, kLanes>, Column<A, kThreads>>;

// Gives a Column its place: `rows` columns of the block's shared memory starting at row `first`.
template <class A, int kRows, int kLanes>
__device__ __forceinline__ void place(Registers<A, kRows, kLanes>&, int, int) {}
template <class A, int kThreads>
__device__ __forceinline__ void place(Column<A, kThreads>& column, int first, int thread) {
  column.value = reinterpret_cast<A*>(fastlm::cuda::shared_memory()) + first * kThreads + thread;
}

// The filter of a thread's channels. kLanes > 1: weight (D, W) and bias are contiguous and aligned to 16 bytes.
template <class A, int kWidth, int kLanes, int kThreads>
struct Filter {
  Taps<A, kWidth, kWidth, kLanes, kThreads> weight;
  A bias[kLanes];

  template <class P>
  __device__ __forceinline__ void load(const P& p, int width, int64_t channel) {
    if constexpr (kLanes > 1) {
      A all[kWidth * kLanes];
      load_params(p.weight, p.weight_dtype, channel * kWidth, all);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) weight(j, i) = all[i * kWidth + j];
        bias[i] = A(0);
      }
      if (p.bias != nullptr) load_params(p.bias, p.bias_dtype, channel, bias);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        weight(j, 0) = load_param<A>(p.weight, p.weight_dtype, channel * p.weight_dim_stride + j * p.weight_width_stride);
      }
      bias[0] = load_param<A>(p.bias, p.bias_dtype, channel * p.bias_stride);
    }
  }
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// 1 / (1 + e^-x) in fp32 from the approximate 2^x and 1/x: relative error below 4e-7 for |x| < 4, growing with |x| as the
// rounding of x log2(e) does (1.5e-6 at -20), far below one rounding of the sums it is applied to; 0 below -88.
__device__ __forceinline__ float sigmoid_approx(float x) {
  return fastlm::cuda::rcp_approx(1.0f + fastlm::cuda::exp2_approx(-1.44269504f * x));
}
__device__ __forceinline__ double sigmoid_approx(double x) { return fastlm::cuda::sigmoid(x); }

template <class A>
__device__ __forceinline__ A activate(A sum, bool silu) {
  return silu ? sum * sigmoid_approx(sum) : sum;
}
// dout times the derivative of the activation at `sum`. Chosen at the end: a branch would cut the loop around it into many
// blocks.
template <class A>
__device__ __forceinline__ A before_activation(A dout, A sum, bool silu) {
  const A s = sigmoid_approx(sum);
  const A slope = s * multiply_add(sum, A(1) - s, A(1));
  return dout * (silu ? slope : A(1));
}

}  // namespace fastlm::causal_conv1d::cuda
