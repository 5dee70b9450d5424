// Rows of slabs (core/cuda/gemm/slab.cuh) in pieces of 32 or 16 columns, so that an epilogue that reads and writes several
// matrices holds little of them at a time. A lane has kValues values of a piece, number 2 j + k for column 8 j + 2 c + k.
#pragma once

#include "core/cuda/gemm/slab.cuh"

namespace fastlm::moe_dispatch::cuda {

using fastlm::cuda::gemm::Slab;

// How the values of one part of a slab are cut: kCount is that of the part.
template <int kCount>
struct Pieces {
  static constexpr int kValues = kCount >= 16 ? 8 : kCount / 2;  // of a lane and a row
  static constexpr int kColumns = 4 * kValues;
  static constexpr int kNumber = kCount / (2 * kValues);
  // Where value v of piece q in row i of the lane's two stands in the slab.
  static constexpr __device__ __forceinline__ int place(int i, int q, int v) {
    return 4 * (q * kValues / 2 + v / 2) + 2 * i + v % 2;
  }
};

template <class T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  low = fastlm::cuda::to_acc(T{static_cast<uint16_t>(pair)});
  high = fastlm::cuda::to_acc(T{static_cast<uint16_t>(pair >> 16)});
}

// Eight 16-bit elements as a queue, for loops that are not unrolled: rows that are no multiple of 16 bytes are rare, and unrolled
// they would be most of an epilogue's code.
__device__ __forceinline__ void shift_up(uint32_t (&word)[4], uint16_t first) {
#pragma unroll
  for (int j = 3; j > 0; --j) word[j] = word[j] << 16 | word[j - 1] >> 16;
  word[0] = word[0] << 16 | first;
}
__device__ __forceinline__ uint16_t shift_down(uint32_t (&word)[4]) {
  const auto first = static_cast<uint16_t>(word[0]);
#pragma unroll
  for (int j = 0; j < 3; ++j) word[j] = word[j] >> 16 | word[j + 1] << 16;
  word[3] >>= 16;
  return first;
}

// One row's piece in memory: `line` is its first element, `left` columns of the matrix are behind that. `valid`: whether there is
// such a row. `wide`: rows lie on 16 bytes and end there, so that a lane's eight elements of 16 bits are all there or none is.
// Called by all lanes of a warp.
template <class T>
struct PieceLine {
  using A = acc_t<T>;
  int64_t left;
  int lane;
  bool valid, wide;

  // Elements behind the first of the eight in a row that are this lane's in memory.
  __device__ __forceinline__ int64_t mine() const { return left - lane % 4 * 8; }
  __device__ __forceinline__ bool has(int v) const { return 8 * (v / 2) + lane % 4 * 2 + v % 2 < left; }

  // What is not there reads as 0.
  template <int kValues>
  __device__ __forceinline__ void load(const T* line, A (&value)[kValues]) const {
    if constexpr (sizeof(T) == 2 && kValues == 8) {
      const T* const from = line + lane % 4 * 8;
      uint32_t word[4] = {};
      if (wide) {
        if (valid && mine() > 0) {
          const uint4 piece = *reinterpret_cast<const uint4*>(from);
          word[0] = piece.x, word[1] = piece.y, word[2] = piece.z, word[3] = piece.w;
        }
      } else {
#pragma unroll 1
        for (int e = 7; e >= 0; --e) {
          shift_up(word, valid && e < mine() ? from[e].bits : 0);
        }
      }
      fastlm::cuda::gemm::gather_pieces(word, lane);  // its own inverse
#pragma unroll
      for (int j = 0; j < 4; ++j) unpack_pair<T>(word[j], value[2 * j], value[2 * j + 1]);
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        value[v] = valid && has(v) ? fastlm::cuda::to_acc(line[8 * (v / 2) + lane % 4 * 2 + v % 2]) : A(0);
      }
    }
  }

  template <int kValues>
  __device__ __forceinline__ void store(T* line, const A (&value)[kValues]) const {
    if constexpr (sizeof(T) == 2 && kValues == 8) {
      T* const to = line + lane % 4 * 8;
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = fastlm::cuda::pack_pair<T>(value[2 * j], value[2 * j + 1]);
      fastlm::cuda::gemm::gather_pieces(word, lane);
      if (!valid) return;
      if (wide) {
        if (mine() > 0) fastlm::cuda::store_words<16>(to, word);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8 && e < mine(); ++e) to[e] = {shift_down(word)};
      }
    } else if (valid) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (has(v)) line[8 * (v / 2) + lane % 4 * 2 + v % 2] = fastlm::cuda::from_acc<T>(value[v]);
      }
    }
  }

  // value += bias of these columns.
  template <int kValues>
  __device__ __forceinline__ void add(const A* bias, A (&value)[kValues]) const {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (has(v)) value[v] += bias[8 * (v / 2) + lane % 4 * 2 + v % 2];
    }
  }
};

}  // namespace fastlm::moe_dispatch::cuda
