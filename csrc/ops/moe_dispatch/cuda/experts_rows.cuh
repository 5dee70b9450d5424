// What happens to sorted rows beside the products: copies, the weighted sum of a token's experts, sums over the rows of an
// expert. Bound by memory.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/gemm/tiles.cuh"
#include "ops/moe_dispatch/cuda/experts.h"

namespace fastlm::moe_dispatch::cuda {

using fastlm::cuda::from_acc;
using fastlm::cuda::multiply_add;
using fastlm::cuda::to_acc;
using gemm::clamped;

constexpr int kRowThreads = 128;

// Rows of experts: those in front of the end of the last group.
__device__ __forceinline__ int64_t rows_used(const gemm::Ragged& r) {
  return clamped(fastlm::cuda::load_index(r.offsets, r.wide, r.groups), 0, r.rows);
}

// kWidth elements of a row, as one access.
template <class T, int kWidth>
struct Vector {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16);
  struct alignas(kWidth * sizeof(T)) Raw {
    T at[kWidth];
  };
  Raw raw;

  __device__ __forceinline__ void load(const T* from) { raw = *reinterpret_cast<const Raw*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Raw*>(to) = raw; }
};
template <class T>
constexpr int kWideElements = 16 / sizeof(T);

// A block is cut into teams of threads, each of which walks along one row.
struct RowTeams {
  int threads;    // of a team, a power of two
  int64_t row;    // of the thread's team
  int64_t first;  // element that the thread begins with

  static int fitting(int64_t pieces) {
    int threads = 1;
    while (threads < kRowThreads && threads < pieces) threads *= 2;
    return threads;
  }
  __device__ __forceinline__ RowTeams(int team, int width)
      : threads(team),
        row(static_cast<int64_t>(blockIdx.x) * (kRowThreads / team) + threadIdx.x / team),
        first(static_cast<int64_t>(threadIdx.x % team) * width) {}
};

template <class A>
__global__ void __launch_bounds__(kRowThreads) weights_kernel(const __grid_constant__ WeightsCall p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row < p.rows) static_cast<A*>(p.weight)[row] = static_cast<const A*>(p.weights)[clamped(p.perm[row], 0, p.rows - 1)];
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) copy_kernel(const __grid_constant__ CopyCall p, int team) {
  const RowTeams place(team, kWidth);
  if (place.row >= rows_used(p.rows)) return;
  const T* const from = static_cast<const T*>(p.from) + clamped(p.token[place.row], 0, p.tokens - 1) * p.row_stride;
  T* const to = static_cast<T*>(p.to) + place.row * p.columns;
  const int64_t step = static_cast<int64_t>(team) * kWidth;
  int64_t i = place.first;
  for (; i + 3 * step < p.columns; i += 4 * step) {
    Vector<T, kWidth> v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j].load(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j].store(to + i + j * step);
  }
  for (; i < p.columns; i += step) {
    Vector<T, kWidth> v;
    v.load(from + i);
    v.store(to + i);
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) clear_kernel(const __grid_constant__ ClearCall p) {
  T* const data = static_cast<T*>(p.data);
  const int64_t end = p.rows.rows * p.columns, step = static_cast<int64_t>(gridDim.x) * kRowThreads;
  for (int64_t i = rows_used(p.rows) * p.columns + static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < end;
       i += step) {
    data[i] = from_acc<T>(acc_t<T>(0));
  }
}

// kMost: at least k. All picks' pieces are under way before the first is used.
template <class T, int kMost, int kWidth>
__global__ void __launch_bounds__(kRowThreads) combine_kernel(const __grid_constant__ CombineCall p, int team) {
  using A = acc_t<T>;
  const RowTeams place(team, kWidth);
  if (place.row >= p.tokens) return;
  const int64_t used = rows_used(p.of);
  const T* line[kMost];
  A weight[kMost];
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    line[j] = nullptr;
    weight[j] = A(1);
    if (j >= p.top_k) continue;
    const int64_t row = p.inv[place.row * p.top_k + j];
    if (row < 0 || row >= used) continue;
    line[j] = static_cast<const T*>(p.rows) + row * p.columns;
    if (p.weights != nullptr) weight[j] = static_cast<const A*>(p.weights)[place.row * p.top_k + j];
  }
  T* const y = static_cast<T*>(p.y) + place.row * p.columns;
  const int64_t step = static_cast<int64_t>(team) * kWidth;
  constexpr int kAhead = kMost <= 2 ? 2 : 1;  // pieces of each row
  for (int64_t i = place.first; i < p.columns; i += kAhead * step) {
    Vector<T, kWidth> piece[kAhead][kMost];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (line[j] != nullptr && i + a * step < p.columns) piece[a][j].load(line[j] + i + a * step);
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * step >= p.columns) continue;
      A sum[kWidth] = {};
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (line[j] == nullptr) continue;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] = multiply_add(weight[j], to_acc(piece[a][j].raw.at[e]), sum[e]);
      }
      Vector<T, kWidth> out;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) out.raw.at[e] = from_acc<T>(sum[e]);
      out.store(y + i + a * step);
    }
  }
}

// Row r of a matrix of sorted rows.
template <class T>
__device__ __forceinline__ const T* sorted_line(const gemm::Matrix& m, int64_t row) {
  const int64_t line = m.index == nullptr ? row : clamped(m.index[row], 0, m.lines - 1);
  return static_cast<const T*>(m.data) + line * m.line_stride;
}

// Sums over runs of rows as long as an expert's share of rows is in `splits` parts; blocks of kSumRows rows are summed one after
// the other, since one chain over thousands of rows would lose digits.
constexpr int64_t kSumRows = 256;

template <class T>
__global__ void __launch_bounds__(kRowThreads) sums_kernel(const __grid_constant__ SumsCall p) {
  using A = acc_t<T>;
  const int64_t across = (p.columns + kRowThreads - 1) / kRowThreads;
  const int64_t part = blockIdx.x / across, column = blockIdx.x % across * kRowThreads + threadIdx.x;
  if (column >= p.columns) return;
  const gemm::Range rows = gemm::rows_of(p.rows, part / p.splits);
  const int64_t each = (rows.end - rows.begin + p.splits - 1) / p.splits, first = rows.begin + part % p.splits * each;
  const int64_t end = first + each < rows.end ? first + each : rows.end;
  A sum = A(0);
  for (int64_t block = first; block < end; block += kSumRows) {
    A of_block = A(0);
    const int64_t stop = block + kSumRows < end ? block + kSumRows : end;
#pragma unroll 4
    for (int64_t r = block; r < stop; ++r) {
      const A w = p.weight == nullptr ? A(1) : static_cast<const A*>(p.weight)[r];
      of_block = multiply_add(w, to_acc(sorted_line<T>(p.from, r)[column]), of_block);
    }
    sum += of_block;
  }
  static_cast<A*>(p.partial)[part * p.columns + column] = sum;
}

template <class A>
__global__ void __launch_bounds__(kRowThreads) finish_sums_kernel(const __grid_constant__ SumsCall p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= p.rows.groups * p.columns) return;
  const A* const from = static_cast<const A*>(p.partial) + i / p.columns * p.splits * p.columns + i % p.columns;
  A sum = A(0);
  for (int64_t s = 0; s < p.splits; ++s) sum += from[s * p.columns];
  fastlm::cuda::store_param(p.out, p.dtype, i, sum);
}

// The group that has `row`, which one of them has.
__device__ __forceinline__ int64_t group_of(const gemm::Ragged& r, int64_t row) {
  int64_t low = 0, high = r.groups - 1;  // the first group that ends behind the row
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (fastlm::cuda::load_index(r.offsets, r.wide, middle + 1) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// One thread for each row; a warp where a bias is to be multiplied with the row's gradient.
template <class T, bool kBias>
__global__ void __launch_bounds__(kRowThreads) pick_gradient_kernel(const __grid_constant__ PickGradientCall p) {
  using A = acc_t<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t row = kBias ? number / 32 : number;
  if (row >= p.rows.rows) return;
  A sum = A(0);
  if (row < rows_used(p.rows)) {
    if constexpr (kBias) {
      const T* const dy = sorted_line<T>(p.dy, row);
      const A* const bias = static_cast<const A*>(p.bias) + group_of(p.rows, row) * p.columns;
      for (int64_t i = number % 32; i < p.columns; i += 32) sum = multiply_add(to_acc(dy[i]), bias[i], sum);
      sum = fastlm::cuda::warp_sum(sum);
    }
    A shares = A(0);
    for (int64_t s = 0; s < p.slabs; ++s) shares += static_cast<const A*>(p.shares)[s * p.rows.rows + row];
    sum += shares;
  }
  if (kBias && number % 32 != 0) return;
  fastlm::cuda::store_param(p.out, p.out_dtype, clamped(p.perm[row], 0, p.rows.rows - 1), sum);
}

}  // namespace fastlm::moe_dispatch::cuda
