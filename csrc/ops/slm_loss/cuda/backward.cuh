// The backward pass of the head. With the logits of a wave and a panel of words recomputed and p = e^(z - lse),
//   dz = p (dnll + dlse - dentropy (z - lse + entropy)) - [word = label] dnll,   times 1 - (z / softcap)^2 with a soft cap,
// is laid down for the panel; two more products make its share of dhidden and of dweight.
#pragma once

#include <algorithm>

#include "core/cuda/gemm/gemm.cuh"
#include "ops/slm_loss/cuda/logits.cuh"

namespace fastlm::slm_loss::cuda {

// kPlain: no gradient of the entropy, no soft cap.
template <class T, bool kPlain>
struct LogitGradients {
  using A = acc_t<T>;
  static constexpr int kParts = 1;
  Logits<T> logits;
  int64_t rows;
  const A* row_values;
  fastlm::cuda::gemm::Output dlogits;
  A* bias_slabs;  // or null

  template <int kCount>
  __device__ __forceinline__ void operator()(const fastlm::cuda::gemm::Slab& slab, A (&d)[kCount]) const {
    logits.apply(slab, d);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Rows beyond the last one are worked on like it and not kept.
      const int64_t row = slab.row_of(i) < slab.row_end ? slab.row_of(i) : slab.row_end - 1;
      const A lse = row_values[kLse * rows + row], shared = row_values[kShared * rows + row];
      const A dnll = row_values[kDnll * rows + row];
      const int label = logits.template label_column<kCount>(slab, row);
      // Few slabs hold a row's label: what it takes is kept apart, so that the others do without a comparison for each word.
      const bool here = label >= 0 && label % 8 < 2;
      A taken = dnll;
      if (!kPlain && here && logits.softcap > A(0)) {
#pragma unroll
        for (int n = 0; n < kCount / 2; ++n) {
          if (label == n / 2 * 8 + n % 2) taken = dnll * slope(d[n / 2 * 4 + 2 * i + n % 2]);
        }
      }
      if constexpr (kPlain) {
#pragma unroll
        for (int n = 0; n < kCount / 2; ++n) {
          A& z = d[n / 2 * 4 + 2 * i + n % 2];
          z = shared * exponential(z - lse);
        }
      } else {
        const A dentropy = row_values[kDentropy * rows + row], entropy = row_values[kEntropy * rows + row];
#pragma unroll
        for (int n = 0; n < kCount / 2; ++n) {
          A& z = d[n / 2 * 4 + 2 * i + n % 2];
          const A t = kept_finite(z - lse);
          const A grad = (shared - dentropy * (t + entropy)) * exponential(t);
          z = logits.softcap > A(0) ? grad * slope(z) : grad;
        }
      }
      if (!here) continue;
#pragma unroll
      for (int n = 0; n < kCount / 2; ++n) {
        if (label == n / 2 * 8 + n % 2) d[n / 2 * 4 + 2 * i + n % 2] -= taken;
      }
    }
    if (bias_slabs != nullptr) sum_columns(slab, d);
    fastlm::cuda::gemm::store_slab<T, kCount>(slab, dlogits, d);
  }

  // Of the soft cap at what it made z.
  __device__ __forceinline__ A slope(A z) const {
    const A ratio = z * logits.inverse;
    return A(1) - ratio * ratio;
  }

  // Of the slab's rows, as they are before they are rounded.
  template <int kCount>
  __device__ __forceinline__ void sum_columns(const fastlm::cuda::gemm::Slab& slab, const A (&d)[kCount]) const {
    A* const to = bias_slabs + slab.row / 16 * dlogits.row_stride;
#pragma unroll
    for (int n = 0; n < kCount / 2; ++n) {
      A sum = slab.row_of(0) < slab.row_end ? d[n / 2 * 4 + n % 2] : A(0);
      if (slab.row_of(1) < slab.row_end) sum += d[n / 2 * 4 + 2 + n % 2];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(fastlm::cuda::kFullWarp, sum, distance);
      const int64_t column = slab.column_of(n / 2) + n % 2;
      if (slab.lane < 4 && column < slab.columns) to[column] = sum;
    }
  }
};

template <class A>
struct alignas(2 * sizeof(A)) SumPair {
  A x, y;
};

// Sums, times *factor unless that is null, to elements of T, or to the accumulation type, there added if `add`.
template <class T>
struct Sums {
  using A = acc_t<T>;
  static constexpr int kParts = 1;
  const float* factor;
  fastlm::cuda::gemm::Output elements;  // without data: `sums` it is
  fastlm::cuda::gemm::Output sums;
  bool add;

  template <int kCount>
  __device__ __forceinline__ void operator()(const fastlm::cuda::gemm::Slab& slab, A (&d)[kCount]) const {
    if (factor != nullptr) {
      const A by = static_cast<A>(*factor);
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] *= by;
    }
    if (elements.data != nullptr) return fastlm::cuda::gemm::store_slab<T, kCount>(slab, elements, d);
    if (!add) return fastlm::cuda::gemm::store_slab<A, kCount>(slab, sums, d);
    add_slab(slab, d);
  }

  // What is there comes by pairs, as many at a time as registers allow beside d: one wait for all of them.
  template <int kCount>
  __device__ __forceinline__ void add_slab(const fastlm::cuda::gemm::Slab& slab, A (&d)[kCount]) const {
    constexpr int kPairs = kCount / 4 < 16 ? kCount / 4 : 16;
    A* const base = static_cast<A*>(sums.data);
    const bool paired = sums.row_stride % 2 == 0 && slab.column % 2 == 0 && slab.column + 2 * kCount <= slab.columns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = slab.row_of(i);
      if (row >= slab.row_end) continue;
      A* const line = base + row * sums.row_stride;
      if (paired) {
#pragma unroll
        for (int first = 0; first < kCount / 4; first += kPairs) {
          SumPair<A> so_far[kPairs];
#pragma unroll
          for (int j = 0; j < kPairs; ++j) so_far[j] = *reinterpret_cast<SumPair<A>*>(line + slab.column_of(first + j));
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            so_far[j].x += d[4 * (first + j) + 2 * i];
            so_far[j].y += d[4 * (first + j) + 2 * i + 1];
            *reinterpret_cast<SumPair<A>*>(line + slab.column_of(first + j)) = so_far[j];
          }
        }
        continue;
      }
#pragma unroll
      for (int n = 0; n < kCount / 2; ++n) {
        const int64_t column = slab.column_of(n / 2) + n % 2;
        if (column < slab.columns) line[column] += d[n / 2 * 4 + 2 * i + n % 2];
      }
    }
  }
};

// The panels of one wave.
template <class T>
class BackwardWave {
 public:
  using A = acc_t<T>;
  static constexpr DType kType = DTypeOf<T>::value;

  BackwardWave(const BackwardCall& call, int64_t first, cudaStream_t stream) : c_(call), first_(first), stream_(stream) {}

  cudaError_t run() const {
    cudaError_t status =
        launch_gather(c_.head, &c_.gradients, c_.chosen, c_.wave, first_, c_.row_values, c_.scale, kType, stream_);
    const bool plain = c_.gradients.dentropy == nullptr && !(c_.head.softcap > 0);
    for (int64_t word = 0; word < c_.head.vocab && status == cudaSuccess; word += c_.plan.words) {
      const int64_t words = std::min(c_.plan.words, c_.head.vocab - word);
      status = plain ? dlogits<true>(word, words) : dlogits<false>(word, words);
      if (status == cudaSuccess && c_.dhidden != nullptr) status = dhidden(word, words);
      if (status == cudaSuccess && (c_.dweight != nullptr || c_.dweight_sum != nullptr)) status = dweight(word, words);
      if (status == cudaSuccess && c_.dbias != nullptr) status = launch_dbias(c_, first_, word, words, kType, stream_);
    }
    if (status == cudaSuccess && c_.dhidden != nullptr) status = launch_scatter(c_, first_, kType, stream_);
    return status;
  }

 private:
  template <bool kPlain>
  cudaError_t dlogits(int64_t word, int64_t words) const {
    using fastlm::cuda::gemm::Layout;
    const LogitGradients<T, kPlain> epilogue{{c_.head, c_.wave, word},
                                             c_.wave.rows,
                                             static_cast<const A*>(c_.row_values),
                                             {c_.dlogits, c_.plan.words, 0},
                                             c_.dbias == nullptr ? nullptr : static_cast<A*>(c_.bias_slabs)};
    const auto p = logits_product(c_.head, c_.chosen, c_.wave, first_, word, words, sizeof(T));
    const auto backend = fastlm::cuda::gemm::row_backend(p, kType, Layout::kDepth, 1, false);
    return fastlm::cuda::gemm::row_product<T, Layout::kDepth, false>(backend, p, epilogue, stream_);
  }

  cudaError_t dhidden(int64_t word, int64_t words) const {
    using fastlm::cuda::gemm::Layout;
    fastlm::cuda::gemm::RowProduct p{};
    p.rows = {nullptr, false, 1, c_.wave.rows, c_.chosen.count, first_};
    p.n = c_.head.hidden_size;
    p.k = words;
    p.a = {c_.dlogits, c_.plan.words, 0, nullptr, c_.wave.rows};
    p.b = {static_cast<const T*>(c_.head.weight) + word * c_.head.weight_row_stride, c_.head.weight_row_stride, 0, nullptr,
           words};
    const Sums<T> epilogue{nullptr, {}, {c_.dhidden_sum, c_.head.hidden_size, 0}, word > 0};
    const auto backend = fastlm::cuda::gemm::row_backend(p, kType, Layout::kWidth, 1, false);
    return fastlm::cuda::gemm::row_product<T, Layout::kWidth, false>(backend, p, epilogue, stream_);
  }

  cudaError_t dweight(int64_t word, int64_t words) const {
    const int64_t h = c_.head.hidden_size;
    fastlm::cuda::gemm::OuterProduct p{};
    p.rows = {nullptr, false, 1, c_.wave.rows, c_.chosen.count, first_};
    p.m = words;
    p.n = h;
    p.a = {c_.dlogits, c_.plan.words, 0, nullptr, c_.wave.rows};
    p.b = {c_.wave.hidden, c_.wave.stride, 0, nullptr, c_.wave.rows};
    Sums<T> epilogue{c_.scale == nullptr ? nullptr : c_.scale + 1, {}, {}, first_ > 0};
    if (c_.dweight != nullptr) {
      epilogue.elements = {static_cast<T*>(c_.dweight) + word * h, h, 0};
    } else {
      epilogue.sums = {static_cast<A*>(c_.dweight_sum) + word * h, h, 0};
    }
    return fastlm::cuda::gemm::outer_product<T>(fastlm::cuda::gemm::outer_backend(p, kType), p, epilogue, stream_);
  }

  const BackwardCall& c_;
  const int64_t first_;
  const cudaStream_t stream_;
};

template <class T>
cudaError_t run_backward(const BackwardCall& c, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < c.head.tokens && status == cudaSuccess; first += c.wave.rows) {
    status = BackwardWave<T>(c, first, stream).run();
  }
  return status;
}

}  // namespace fastlm::slm_loss::cuda
