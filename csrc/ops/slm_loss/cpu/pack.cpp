// Packs a group of hidden states and a panel of the weight for the products of both passes (layouts: core/simd/packed_gemm.h): 16-bit
// values become floats, or pairs of bf16 where the CPU multiplies those. Any strides; a packed element is read 100s of times.
#include "core/simd/packed_gemm.h"
#include "ops/slm_loss/cpu/kernels.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::kRowBlock;
using slm_loss::Params;
using slm_loss::Step;

// Row r of a matrix, r counted from the beginning of the group or panel; nothing beyond its end.
template <class T>
struct Rows {
  const T* first;
  const int64_t* index;  // null: consecutive
  int64_t row_stride, col_stride;
  int64_t count, columns;

  FASTLM_INLINE const T* row(int64_t r) const {
    if (r >= count) return nullptr;
    return first + (index == nullptr ? r : index[r]) * row_stride;
  }
};

// A vector of elements from column c of a row (null: zeros); zeros beyond the last column.
template <class T>
FASTLM_INLINE vec_t<T> read(const Rows<T>& from, const T* row, int64_t c) {
  const int64_t n = from.columns - c;
  if (row == nullptr || n <= 0) return zero<vec_t<T>>();
  if (from.col_stride == 1) return load_upto(row + c, n);
  acc_t<T> lane[lanes_of<T>] = {};
  for (int64_t i = 0; i < n && i < lanes_of<T>; ++i) lane[i] = to_acc(row[(c + i) * from.col_stride]);
  return load(lane);
}

// A vector of words from word w of a row.
template <class T, class W>
struct ReadWords {
  static FASTLM_INLINE vec_t<T> read_at(const Rows<T>& from, const T* row, int64_t w) { return read(from, row, w); }
};
#if defined(FASTLM_BF16_PAIRS)
template <>
struct ReadWords<bfloat16, Bf16Pair> {
  static FASTLM_INLINE VecI read_at(const Rows<bfloat16>& from, const bfloat16* row, int64_t w) {
    const int64_t n = from.columns - 2 * w;
    bfloat16 lane[2 * kLanesF] = {};
    if (row != nullptr && n > 0) {
      if (from.col_stride == 1 && n >= 2 * kLanesF) {
        __builtin_memcpy(lane, row + 2 * w, sizeof(lane));
      } else {
        for (int64_t i = 0; i < n && i < 2 * kLanesF; ++i) lane[i] = row[(2 * w + i) * from.col_stride];
      }
    }
    VecI words;
    __builtin_memcpy(&words, lane, sizeof(words));
    return words;
  }
};
#endif

template <class W, class V>
FASTLM_INLINE void store_words(W* to, V words) {
  __builtin_memcpy(to, &words, sizeof(words));
}

// Rows of A: (words / N, capacity, N).
template <class T, class W>
void pack_rows(const Rows<T>& from, int64_t capacity, W* out, int64_t begin, int64_t end) {
  constexpr int64_t kN = kColumns<W>;
  const int64_t words = ceil_div(from.columns, Tile<W>::kGroup);
  for (int64_t r = begin; r < end; ++r) {
    const T* row = from.row(r);
    for (int64_t run = 0; run * kN < words; ++run) {
      W* to = out + (run * capacity + r) * kN;
      for (int64_t i = 0; i < kN; i += kLanes<W>) {
        store_words(to + i, ReadWords<T, W>::read_at(from, row, run * kN + i));
      }
    }
  }
}

// Columns of B whose k are the matrix's rows: (columns / N, capacity / group, N). For one element per word this is pack_rows.
#if defined(FASTLM_BF16_PAIRS)
void pack_row_pairs(const Rows<bfloat16>& from, int64_t capacity, Bf16Pair* out, int64_t begin, int64_t end) {
  constexpr int64_t kN = kColumns<Bf16Pair>;
  for (int64_t r = begin; r < end; r += 2) {
    const bfloat16* low = from.row(r);
    const bfloat16* high = from.row(r + 1);
    for (int64_t c = 0; c < from.columns; c += kLanesF) {
      const VecI low_bits = ((VecI)read(from, low, c) >> 16) & 0xffff;
      const VecI words = low_bits | (VecI)read(from, high, c);
      store_words(out + ((c / kN) * (capacity / 2) + r / 2) * kN + c % kN, words);
    }
    // The rest of the last tile's columns: products there are thrown away, but they must not read what was never written.
    for (int64_t c = ceil_div(from.columns, kLanesF) * kLanesF; c % kN != 0; c += kLanesF) {
      store_words(out + ((c / kN) * (capacity / 2) + r / 2) * kN + c % kN, VecI{});
    }
  }
}
#endif

// Columns of B that are the matrix's rows: (rows / N, words, N).
template <class T, class W>
void pack_columns(const Rows<T>& from, W* out, int64_t begin, int64_t end) {
  constexpr int64_t kN = kColumns<W>;
  constexpr int64_t kL = kLanes<W>;
  const int64_t words = ceil_div(from.columns, Tile<W>::kGroup);
  for (int64_t r0 = begin; r0 < end; r0 += kN) {
    W* panel = out + r0 * words;
    for (int64_t w0 = 0; w0 < words; w0 += kL) {
      W block[kN][kL];
      for (int64_t r = 0; r < kN; ++r) store_words(block[r], ReadWords<T, W>::read_at(from, from.row(r0 + r), w0));
      const int64_t n = min_of(kL, words - w0);
      for (int64_t w = 0; w < n; ++w) {
        for (int64_t r = 0; r < kN; ++r) panel[(w0 + w) * kN + r] = block[r][w];
      }
    }
  }
}

template <class T>
void pack_hidden(const Params& p, const Step& s, int64_t begin, int64_t end) {
  using W = word_t<T>;
  const Rows<T> from{static_cast<const T*>(p.hidden), p.rows + s.row_begin, p.hidden_row_stride, p.hidden_col_stride,
                     s.row_end - s.row_begin, p.hidden_size};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t r0 = block * kRowBlock;
    const int64_t r1 = ceil_div(min_of(r0 + kRowBlock, from.count), kTileRows) * kTileRows;
    pack_rows<T, W>(from, p.group_size, static_cast<W*>(p.hidden_rows), r0, r1);
#if defined(FASTLM_BF16_PAIRS)
    if constexpr (Tile<W>::kGroup == 2) {
      if (p.hidden_columns != nullptr) {
        pack_row_pairs(from, p.group_size, static_cast<W*>(p.hidden_columns), r0, r1);
      }
    }
#endif
  }
}

template <class T>
void pack_weight(const Params& p, const Step& s, int64_t begin, int64_t end) {
  using W = word_t<T>;
  const Rows<T> from{static_cast<const T*>(p.weight) + s.vocab_begin * p.weight_row_stride, nullptr, p.weight_row_stride,
                     p.weight_col_stride, s.vocab_end - s.vocab_begin, p.hidden_size};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t r0 = block * kRowBlock;
    const int64_t r1 = r0 + kRowBlock;
    pack_columns<T, W>(from, static_cast<W*>(p.weight_columns), r0, r1);
    if (p.weight_rows != nullptr) {
#if defined(FASTLM_BF16_PAIRS)
      if constexpr (Tile<W>::kGroup == 2) {
        pack_row_pairs(from, p.panel_size, static_cast<W*>(p.weight_rows), r0, r1);
      } else  // NOLINT
#endif
      {
        pack_rows<T, W>(from, p.panel_size, static_cast<W*>(p.weight_rows), r0, r1);
      }
    }
    auto* bias = static_cast<acc_t<T>*>(p.bias_packed);
    for (int64_t r = r0; r < r1; ++r) {
      bias[r] = r < from.count ? load_param<acc_t<T>>(p.bias, p.bias_dtype, (s.vocab_begin + r) * p.bias_stride) : acc_t<T>(0);
    }
  }
}

}  // namespace

extern const slm_loss::PackKernels slm_loss_pack;
const slm_loss::PackKernels slm_loss_pack = {
    {kColumns<word_t<float>>, kColumns<word_t<bfloat16>>, kColumns<word_t<float16>>, kColumns<word_t<double>>},
    {Tile<word_t<float>>::kGroup, Tile<word_t<bfloat16>>::kGroup, Tile<word_t<float16>>::kGroup, Tile<word_t<double>>::kGroup},
    {pack_hidden<float>, pack_hidden<bfloat16>, pack_hidden<float16>, pack_hidden<double>},
    {pack_weight<float>, pack_weight<bfloat16>, pack_weight<float16>, pack_weight<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
