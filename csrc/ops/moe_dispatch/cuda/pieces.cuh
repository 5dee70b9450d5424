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

// One row's piece in memory: `line` is its first element, `left` columns of the matrix are behind that. `valid`: whether there is
// such a row. `wide`: all lanes may move 16 bytes at once if the piece is whole. Called by all lanes of a warp.
template <class T>
struct PieceLine {
  using A = acc_t<T>;
  int64_t left;
  int lane;
  bool valid, wide;

  template <int kValues>
  __device__ __forceinline__ bool whole() const {
    return sizeof(T) == 2 && kValues == 8 && wide && left >= 32;
  }
  __device__ __forceinline__ bool has(int v) const { return 8 * (v / 2) + lane % 4 * 2 + v % 2 < left; }

  // What is not there reads as 0.
  template <int kValues>
  __device__ __forceinline__ void load(const T* line, A (&value)[kValues]) const {
    if constexpr (sizeof(T) == 2 && kValues == 8) {
      if (whole<kValues>()) {
        uint4 piece{};
        if (valid) piece = *reinterpret_cast<const uint4*>(line + lane % 4 * 8);
        uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
        fastlm::cuda::gemm::gather_pieces(word, lane);  // its own inverse
#pragma unroll
        for (int j = 0; j < 4; ++j) unpack_pair<T>(word[j], value[2 * j], value[2 * j + 1]);
        return;
      }
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = valid && has(v) ? fastlm::cuda::to_acc(line[8 * (v / 2) + lane % 4 * 2 + v % 2]) : A(0);
    }
  }

  template <int kValues>
  __device__ __forceinline__ void store(T* line, const A (&value)[kValues]) const {
    if constexpr (sizeof(T) == 2 && kValues == 8) {
      if (whole<kValues>()) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) word[j] = fastlm::cuda::pack_pair<T>(value[2 * j], value[2 * j + 1]);
        fastlm::cuda::gemm::gather_pieces(word, lane);
        if (valid) fastlm::cuda::store_words<16>(line + lane % 4 * 8, word);
        return;
      }
    }
    if (!valid) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (has(v)) line[8 * (v / 2) + lane % 4 * 2 + v % 2] = fastlm::cuda::from_acc<T>(value[v]);
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
