// What the passes do beside products: which tokens take part, their hidden states gathered and gradients scattered, sums over
// slabs. Bound by memory; a wave's rows are far fewer bytes than its products read.
#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "core/integers.h"
#include "ops/slm_loss/cuda/logits.cuh"
#include "ops/slm_loss/cuda/nll.h"

namespace fastlm::slm_loss::cuda {
namespace {

using fastlm::cuda::launch;

constexpr int kThreads = 256, kScaleThreads = 1024, kCopyThreads = 128;

// Sums over slabs: a block has 32 columns (tokens or words) and eight parts of the slabs, added up in order.
constexpr int kParts = kThreads / 32;

struct Scale {
  float factor, inverse;
};

// Rows of the wave that begins at `first`.
__device__ __forceinline__ int64_t rows_there(const int32_t* count, int64_t first, int64_t rows) {
  const int64_t left = *count - first;
  return left < 0 ? 0 : left < rows ? left : rows;
}

__device__ __forceinline__ int64_t label_of(const Head& head, int64_t token) {
  const int64_t label = fastlm::cuda::load_index(head.labels, head.labels_64, token);
  return label == head.ignore_index || label < 0 || label >= head.vocab ? -1 : label;
}

template <class A>
__device__ __forceinline__ A value_of(const void* values, int64_t token) {
  return values == nullptr ? A(0) : static_cast<const A*>(values)[token];
}

// ---- float16 ------------------------------------------------------------------------------------------------------------------

// Gradients of logits of float16 vanish where those of the tokens are small, as after a division by their number. |dlogits| is at
// most |dnll| + |dlse| + 16 |dentropy| for vocabularies below e^16, whose largest becomes 2^10: products of 2^-34 are still
// there.
__global__ void __launch_bounds__(kScaleThreads)
    find_scale(const __grid_constant__ Head head, const __grid_constant__ TokenGradients gradients, float* scale) {
  auto* const tops = reinterpret_cast<float*>(fastlm::cuda::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  float top = 0;
  for (int64_t token = thread; token < head.tokens; token += kScaleThreads) {
    if (label_of(head, token) < 0) continue;
    const float x = fabsf(value_of<float>(gradients.dnll, token)) + fabsf(value_of<float>(gradients.dlse, token)) +
                    16.0f * fabsf(value_of<float>(gradients.dentropy, token));
    if (x > top && x < INFINITY) top = x;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(fastlm::cuda::kFullWarp, top, distance);
    top = other > top ? other : top;
  }
  if (thread % 32 == 0) tops[thread / 32] = top;
  __syncthreads();
  if (thread != 0) return;
  for (int w = 0; w < kScaleThreads / 32; ++w) top = tops[w] > top ? tops[w] : top;
  int exponent = top > 0 ? 10 - ilogbf(top) : 0;
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  scale[0] = ldexpf(1.0f, exponent);
  scale[1] = ldexpf(1.0f, -exponent);
}

// ---- gathering and scattering -------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    gather(const __grid_constant__ Head head, const __grid_constant__ TokenGradients gradients, Chosen chosen,
           const __grid_constant__ Wave wave, int64_t first, acc_t<T>* row_values, const float* scale) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  if (row >= rows_there(chosen.count, first, wave.rows)) return;
  const int64_t token = chosen.positions[first + row];
  const T* const from = static_cast<const T*>(head.hidden) + token * head.hidden_row_stride;
  T* const to = static_cast<T*>(wave.hidden) + row * wave.stride;
  constexpr int kEach = 16 / sizeof(T);
  int64_t copied = 0;
  if (head.hidden_col_stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    copied = head.hidden_size / kEach * kEach;
    for (int64_t i = threadIdx.x * kEach; i < copied; i += kCopyThreads * kEach) {
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
  }
  for (int64_t i = copied + threadIdx.x; i < head.hidden_size; i += kCopyThreads) to[i] = from[i * head.hidden_col_stride];
  if (threadIdx.x != 0) return;
  wave.label[row] = static_cast<int32_t>(label_of(head, token));
  if (row_values == nullptr) return;
  const A factor = scale == nullptr ? A(1) : static_cast<A>(*scale);
  const A dnll = value_of<A>(gradients.dnll, token) * factor;
  row_values[kLse * wave.rows + row] = value_of<A>(gradients.lse, token);
  row_values[kShared * wave.rows + row] = dnll + value_of<A>(gradients.dlse, token) * factor;
  row_values[kDnll * wave.rows + row] = dnll;
  row_values[kDentropy * wave.rows + row] = value_of<A>(gradients.dentropy, token) * factor;
  row_values[kEntropy * wave.rows + row] = value_of<A>(gradients.entropy, token);
}

template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    scatter(const acc_t<T>* sum, int64_t columns, T* dhidden, Chosen chosen, int64_t first, int64_t rows, const float* scale) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  if (row >= rows_there(chosen.count, first, rows)) return;
  const A inverse = scale == nullptr ? A(1) : static_cast<A>(scale[1]);
  const A* const from = sum + row * columns;
  T* const to = dhidden + chosen.positions[first + row] * columns;
  for (int64_t i = threadIdx.x; i < columns; i += kCopyThreads) to[i] = fastlm::cuda::from_acc<T>(from[i] * inverse);
}

// ---- sums over slabs ----------------------------------------------------------------------------------------------------------

template <class A>
struct SlabStatistics {
  const A* slab_max;
  const A* slab_sum;
  const A* slab_weighted;  // or null
  const A* label_logit;
  A* nll;
  A* lse;
  A* entropy;
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ SlabStatistics<A> s, int64_t slabs, Chosen chosen, int64_t first, int64_t rows) {
  A* const shared = reinterpret_cast<A*>(fastlm::cuda::shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, part = static_cast<int>(threadIdx.x) / 32;
  const int64_t there = rows_there(chosen.count, first, rows), begin = static_cast<int64_t>(blockIdx.x) * 32;
  if (begin >= there) return;
  const int64_t row = begin + lane < there ? begin + lane : there - 1;
  A top = minus_infinity<A>();
#pragma unroll 4
  for (int64_t i = part; i < slabs; i += kParts) {
    top = larger(top, s.slab_max[i * rows + row]);
  }
  shared[part * 32 + lane] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kParts; ++i) top = larger(top, shared[i * 32 + lane]);
  __syncthreads();
  const A reference = top == minus_infinity<A>() ? A(0) : top;
  A sum = 0, weighted = 0;
#pragma unroll 4
  for (int64_t i = part; i < slabs; i += kParts) {
    const A t = kept_finite(s.slab_max[i * rows + row] - reference);
    const A scale = exponential(t), own = s.slab_sum[i * rows + row];
    sum = fastlm::cuda::multiply_add(scale, own, sum);
    if (s.slab_weighted != nullptr) {
      weighted = fastlm::cuda::multiply_add(scale, fastlm::cuda::multiply_add(t, own, s.slab_weighted[i * rows + row]), weighted);
    }
  }
  shared[part * 32 + lane] = sum;
  shared[(kParts + part) * 32 + lane] = weighted;
  __syncthreads();
  if (part != 0 || begin + lane >= there) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) {
    sum += shared[i * 32 + lane];
    weighted += shared[(kParts + i) * 32 + lane];
  }
  const int64_t token = chosen.positions[first + row];
  const A log_sum = log(sum);
  s.lse[token] = top + log_sum;
  // Not lse - z: the maximum and the label's logit are close, and lse has lost what log_sum has below their last digit.
  s.nll[token] = (top - s.label_logit[row]) + log_sum;
  if (s.entropy != nullptr) s.entropy[token] = log_sum - weighted / sum;
}

template <class A>
__global__ void __launch_bounds__(kThreads) sum_dbias(const A* bias_slabs, int64_t stride, int64_t words, A* dbias,
                                                      const int32_t* count, int64_t first, int64_t rows, const float* scale) {
  A* const shared = reinterpret_cast<A*>(fastlm::cuda::shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, part = static_cast<int>(threadIdx.x) / 32;
  const int64_t word = static_cast<int64_t>(blockIdx.x) * 32 + lane, slabs = (rows_there(count, first, rows) + 15) / 16;
  A sum = 0;
  if (word < words) {
#pragma unroll 4
    for (int64_t i = part; i < slabs; i += kParts) sum += bias_slabs[i * stride + word];
  }
  shared[part * 32 + lane] = sum;
  __syncthreads();
  if (part != 0 || word >= words) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += shared[i * 32 + lane];
  if (scale != nullptr) sum *= static_cast<A>(scale[1]);
  dbias[word] = first == 0 ? sum : dbias[word] + sum;
}

unsigned int blocks_of(int64_t n, int64_t each) { return static_cast<unsigned int>(ceil_div(n, each)); }

template <class F>
auto visit_acc(DType dtype, F&& f) {
  return dtype == DType::kFloat64 ? f.template operator()<double>() : f.template operator()<float>();
}

}  // namespace

cudaError_t launch_scale(const Head& head, const TokenGradients& gradients, float* scale, cudaStream_t stream) {
  return launch<find_scale>(dim3(1), kScaleThreads, 128, stream, head, gradients, scale);
}

cudaError_t launch_gather(const Head& head, const TokenGradients* gradients, const Chosen& chosen, const Wave& wave,
                          int64_t first, void* row_values, const float* scale, DType dtype, cudaStream_t stream) {
  const TokenGradients given = gradients == nullptr ? TokenGradients{} : *gradients;
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    return launch<gather<T>>(dim3(blocks_of(wave.rows, 1)), kCopyThreads, 0, stream, head, given, chosen, wave, first,
                             static_cast<acc_t<T>*>(row_values), scale);
  });
}

cudaError_t launch_finish(const ForwardCall& c, int64_t first, DType dtype, cudaStream_t stream) {
  return visit_acc(dtype, [&]<class A>() {
    const auto in = [](void* p) { return static_cast<const A*>(p); };
    const auto out = [](void* p) { return static_cast<A*>(p); };
    const bool entropy = c.entropy != nullptr;
    const SlabStatistics<A> s{in(c.slab_max),    in(c.slab_sum), entropy ? in(c.slab_weighted) : nullptr,
                              in(c.label_logit), out(c.nll),     out(c.lse),
                              out(c.entropy)};
    return launch<finish<A>>(dim3(blocks_of(c.wave.rows, 32)), kThreads, 2 * kThreads * sizeof(A), stream, s, c.plan.slabs,
                             c.chosen, first, c.wave.rows);
  });
}

cudaError_t launch_scatter(const BackwardCall& c, int64_t first, DType dtype, cudaStream_t stream) {
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() {
    return launch<scatter<T>>(dim3(blocks_of(c.wave.rows, 1)), kCopyThreads, 0, stream,
                              static_cast<const acc_t<T>*>(c.dhidden_sum), c.head.hidden_size, static_cast<T*>(c.dhidden),
                              c.chosen, first, c.wave.rows, static_cast<const float*>(c.scale));
  });
}

cudaError_t launch_dbias(const BackwardCall& c, int64_t first, int64_t word, int64_t words, DType dtype, cudaStream_t stream) {
  return visit_acc(dtype, [&]<class A>() {
    return launch<sum_dbias<A>>(dim3(blocks_of(words, 32)), kThreads, kThreads * sizeof(A), stream,
                                static_cast<const A*>(c.bias_slabs), c.plan.words, words, static_cast<A*>(c.dbias) + word,
                                static_cast<const int32_t*>(c.chosen.count), first, c.wave.rows,
                                static_cast<const float*>(c.scale));
  });
}

}  // namespace fastlm::slm_loss::cuda
