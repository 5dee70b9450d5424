// Gradients of the per-token losses of a linear head. With the logits recomputed block by block and p_v = e^(z_v - lse):
//   dz_v = p_v (dnll + dlse - dentropy (z_v - lse + entropy)) - [v = label] dnll,   times 1 - (z_v / softcap)^2 with a soft cap,
//   dhidden = dz weight,  dweight = dz^T hidden,  dbias = column sums of dz.
// dz of a panel of the vocabulary is laid down for all rows; then dhidden takes its share (panels in order), and the panel's rows
// of dweight are final. Sums are kept in the accumulation type. Bound by three products, 6 n h V operations.
#include "core/scratch.h"
#include "core/simd/lane_sums.h"
#include "ops/slm_loss/cpu/kernels.h"
#include "ops/slm_loss/cpu/logits.h"

namespace fastlm::FASTLM_CPU_LEVEL {
namespace {

using slm_loss::BackwardParams;
using slm_loss::kColumnBlock;
using slm_loss::kRowBlock;
using slm_loss::kTokenBlock;
using slm_loss::kWordBlock;
using slm_loss::Panel;

// Rows of per_token.
enum PerToken : int64_t { kLse, kShared, kDnll, kDentropy, kEntropy };

template <class A>
void tokens(const BackwardParams& p, int64_t piece) {
  const auto value = [&](const void* from, int64_t at) { return from == nullptr ? A(0) : static_cast<const A*>(from)[at]; };
  for (int64_t t = piece * kTokenBlock; t < (piece + 1) * kTokenBlock; ++t) {
    A* to = static_cast<A*>(p.per_token) + t;
    const bool counts = t < p.num_tokens;
    const int64_t at = counts ? p.positions[t] : 0;
    to[kLse * p.capacity] = counts ? value(p.lse, at) : static_cast<A>(__builtin_inff());  // every probability is 0
    to[kShared * p.capacity] = counts ? value(p.dnll, at) + value(p.dlse, at) : A(0);
    to[kDnll * p.capacity] = counts ? value(p.dnll, at) : A(0);
    to[kDentropy * p.capacity] = counts ? value(p.dentropy, at) : A(0);
    to[kEntropy * p.capacity] = counts ? value(p.entropy_in, at) : A(0);
  }
}

// What the gradients of a vector of tokens need.
template <class E>
struct Tokens {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  using Index = typename VectorOf<A>::mask;
  V lse, shared, dnll, dentropy, entropy;
  Index label;
  bool capped;
  V inverse_cap;

  FASTLM_INLINE void read(const BackwardParams& p, int64_t token, const typename PanelLabels<E>::Index* labels) {
    const A* from = static_cast<const A*>(p.per_token) + token;
    lse = load(from + kLse * p.capacity);
    shared = load(from + kShared * p.capacity);
    dnll = load(from + kDnll * p.capacity);
    dentropy = load(from + kDentropy * p.capacity);
    entropy = load(from + kEntropy * p.capacity);
    __builtin_memcpy(&label, labels, sizeof(label));
    capped = p.softcap > 0;
    inverse_cap = broadcast<V>(capped ? static_cast<A>(1 / p.softcap) : A(0));
  }

  // dz of a word. kPlain: no gradient of the entropy, no soft cap.
  template <bool kPlain>
  FASTLM_INLINE V gradient(V z, int64_t word) const {
    const V t = shifted(z, lse);
    const V factor = kPlain ? shared : shared - dentropy * (t + entropy);
    V grad = factor * exp_fast(t);
    grad = label == static_cast<typename PanelLabels<E>::Index>(word) ? grad - dnll : grad;
    if (kPlain || !capped) return grad;
    const V ratio = z * inverse_cap;
    return grad * (1 - ratio * ratio);
  }
};

// dz of N tokens, in place: both products read floats from one layout. The sums over the tokens' lanes are added to `sums`, a
// vector per word, unless that is null.
template <class E, bool kPlain>
void panel_gradient(const BackwardParams& p, const Panel& panel, const Block& block, int64_t token, E* z, vec_t<E>* sums) {
  constexpr int64_t kN = kPackedColumns<E>;
  const PanelLabels<E> labels(p.labels + token, block.token + block.tokens - token, panel.begin + block.word, block.words);
  for (int64_t i = 0; i < kN; i += lanes_of<E>) {
    Tokens<E> tokens;
    tokens.read(p, token + i, labels.at + i);
    for (int64_t w = 0; w < block.words; ++w) {
      const vec_t<E> grad = tokens.template gradient<kPlain>(load(z + w * kN + i), w);
      store(z + w * kN + i, grad);
      if (sums != nullptr) sums[w] += grad;
    }
  }
}

// Pairs of bf16: dz is written to the layouts of both products (a run of N pairs of the one is 2 N tokens).
template <class E, bool kPlain>
void panel_gradient_pairs(const BackwardParams& p, const Panel& panel, const Block& block, int64_t token, const float* z,
                          VecF* sums) {
  constexpr int64_t kN = kPackedColumns<E>;
  const PanelLabels<E> labels(p.labels + token, block.token + block.tokens - token, panel.begin + block.word, block.words);
  Tokens<E> tokens[kPackedVectors];
  for (int v = 0; v < kPackedVectors; ++v) tokens[v].read(p, token + v * kLanesF, labels.at + v * kLanesF);
  bfloat16* rows = static_cast<bfloat16*>(panel.dlogits_rows);
  E* transposed = static_cast<E*>(panel.dlogits_transposed);
  if (rows != nullptr) rows += (token / (2 * kN) * panel.size + block.word) * 2 * kN + token % (2 * kN);
  if (transposed != nullptr) transposed += (token / kN * (panel.size / 2) + block.word / 2) * kN;
  for (int64_t w = 0; w < block.words; w += 2) {
    const bool last = w + 1 == block.words;  // an odd number of words: the pair's second half is 0
#pragma GCC unroll 8
    for (int v = 0; v < kPackedVectors; ++v) {
      const float* at = z + w * kN + v * kLanesF;
      const VecF low = tokens[v].template gradient<kPlain>(load(at), w);
      const VecF high = last ? VecF{} : tokens[v].template gradient<kPlain>(load(at + kN), w + 1);
      VecH bits[2] = {bf16_bits(low), bf16_bits(high)};
      if (rows != nullptr) {
        __builtin_memcpy(rows + w * 2 * kN + v * kLanesF, &bits[0], sizeof(bits[0]));
        if (!last) __builtin_memcpy(rows + (w + 1) * 2 * kN + v * kLanesF, &bits[1], sizeof(bits[1]));
      }
      if (transposed != nullptr) {
        const VecI pairs = pair_halves(bits[0], bits[1]);
        __builtin_memcpy(transposed + w / 2 * kN + v * kLanesF, &pairs, sizeof(pairs));
      }
      if (sums != nullptr) {
        sums[w] += low;
        if (!last) sums[w + 1] += high;
      }
    }
  }
}

template <class E>
void dlogits(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using A = operand_acc<E>;
  using V = vec_t<A>;
  constexpr int64_t kN = kPackedColumns<E>;
  constexpr bool kInPlace = depth_per_operand<E> == 1;
  const int64_t across = ceil_div(panel.end - panel.begin, kWordBlock);
  const int64_t token = piece / across * kTokenBlock;
  const int64_t word = piece % across * kWordBlock;
  const Block block{word, min_of(kWordBlock, panel.end - panel.begin - word), token, min_of(kTokenBlock, p.num_tokens - token)};
  A* scratch = static_cast<A*>(thread_scratch(sizeof(A) * (kInPlace ? 0 : kBlockSize) + sizeof(V) * kWordBlock));
  if (scratch == nullptr) return;
  V* sums = p.dbias == nullptr ? nullptr : reinterpret_cast<V*>(scratch);
  if (sums != nullptr) __builtin_memset(sums, 0, sizeof(V) * kWordBlock);
  const int64_t stride = kInPlace ? panel.size * kN : kWordBlock * kN;
  A* z = kInPlace ? static_cast<A*>(panel.dlogits_rows) + token * panel.size + word * kN
                  : scratch + sizeof(V) / sizeof(A) * kWordBlock;
  block_logits<E>(p, block, static_cast<const E*>(panel.weight_rows), panel.size, static_cast<const A*>(panel.bias), z, stride);
  const bool plain = !p.entropy && !(p.softcap > 0);
  for (int64_t t = 0; t < block.tokens; t += kN) {
    A* at = z + t / kN * stride;
    // Lanes of no token: 0, whatever 0 times a weight is, so that their gradient is 0 as well.
    for (int64_t i = block.tokens - t; i < kN; ++i) {
      for (int64_t w = 0; w < block.words; ++w) at[w * kN + i] = A(0);
    }
    if constexpr (kInPlace) {
      plain ? panel_gradient<E, true>(p, panel, block, token + t, at, sums)
            : panel_gradient<E, false>(p, panel, block, token + t, at, sums);
    } else {
      plain ? panel_gradient_pairs<E, true>(p, panel, block, token + t, at, sums)
            : panel_gradient_pairs<E, false>(p, panel, block, token + t, at, sums);
    }
  }
  if (sums == nullptr) return;
  A* to = static_cast<A*>(panel.dbias_blocks) + token / kTokenBlock * panel.size + word;
  for (int64_t w = 0; w < kWordBlock; w += 8) {
    V eight[8];
    for (int64_t i = 0; i < 8; ++i) eight[i] = sums[w + i];
    for (int64_t i = 0; i < 8; ++i) to[w + i] = A(0);
    add_lane_sums(eight, to + w);
  }
}

template <class T>
void write_row(const acc_t<T>* from, T* to, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes_of<T>) store_upto(to + c, load(from + c), n - c);
}

template <class T>
void dhidden(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  const int64_t token = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  const int64_t tokens = min_of(kRowBlock, p.num_tokens - token);
  const int64_t stride = panel.size / depth_per_operand<E> * kN;
  acc_t<T>* sum = static_cast<acc_t<T>*>(p.dhidden_sum) + token * p.padded_hidden + column;
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(panel.dlogits_transposed) + token / kN * stride;
  product.a_stride = stride;
  product.b = static_cast<const E*>(panel.weight_depths) + column / kN * stride;
  product.b_panel_stride = stride;
  product.c = sum;
  product.c_row_stride = p.padded_hidden;
  product.c_panel_stride = kN;
  product.depth = operand_depth<E>(panel.end - panel.begin);
  product.rows = ceil_div(tokens, kPackedRows) * kPackedRows;
  product.columns = min_of(kColumnBlock, p.padded_hidden - column);
  product.add = panel.begin > 0;
  product.block = kPackedDepth / depth_per_operand<E>;  // as many words as the narrowest panel: the same sums for every width
  packed_multiply<E, PackedA::kTransposed>(product);
  if (panel.end < p.vocab) return;
  for (int64_t t = 0; t < tokens; ++t) {
    write_row<T>(sum + t * p.padded_hidden, static_cast<T*>(p.dhidden) + p.positions[token + t] * p.hidden_size + column,
                 min_of(kColumnBlock, p.hidden_size - column));
  }
}

template <class T>
void dweight(const BackwardParams& p, const Panel& panel, int64_t piece) {
  using E = operand_t<T>;
  constexpr int64_t kN = kPackedColumns<E>;
  const int64_t across = ceil_div(p.padded_hidden, kColumnBlock);
  const int64_t word = piece / across * kRowBlock;
  const int64_t column = piece % across * kColumnBlock;
  const int64_t words = min_of(kRowBlock, panel.end - panel.begin - word);
  acc_t<T>* sum = static_cast<acc_t<T>*>(thread_scratch(sizeof(acc_t<T>) * kRowBlock * kColumnBlock));
  if (sum == nullptr) return;
  PackedProduct<E> product{};
  product.a = static_cast<const E*>(panel.dlogits_rows) + word * kN;
  product.a_stride = panel.size * kN;
  product.b_panel_stride = p.capacity / depth_per_operand<E> * kN;
  product.b = static_cast<const E*>(p.hidden_depths) + column / kN * product.b_panel_stride;
  product.c = sum;
  product.c_row_stride = kColumnBlock;
  product.c_panel_stride = kN;
  product.depth = operand_depth<E>(p.num_tokens);
  product.rows = ceil_div(words, kPackedRows) * kPackedRows;
  product.columns = min_of(kColumnBlock, p.padded_hidden - column);
  packed_multiply<E, PackedA::kRows>(product);
  for (int64_t w = 0; w < words; ++w) {
    write_row<T>(sum + w * kColumnBlock, static_cast<T*>(p.dweight) + (panel.begin + word + w) * p.hidden_size + column,
                 min_of(kColumnBlock, p.hidden_size - column));
  }
}

template <class A>
void dbias(const BackwardParams& p, const Panel& panel, int64_t piece) {
  const A* blocks = static_cast<const A*>(panel.dbias_blocks);
  for (int64_t w = piece * kWordBlock; w < min_of((piece + 1) * kWordBlock, panel.end - panel.begin); ++w) {
    A sum = A(0);
    for (int64_t b = 0; b < ceil_div(p.num_tokens, kTokenBlock); ++b) sum += blocks[b * panel.size + w];
    store_param(p.dbias, p.bias_dtype, panel.begin + w, sum);
  }
}

}  // namespace

extern const slm_loss::BackwardKernels slm_loss_backward;
const slm_loss::BackwardKernels slm_loss_backward = {
    {tokens<float>, tokens<float>, tokens<float>, tokens<double>},
    {dlogits<operand_t<float>>, dlogits<operand_t<bfloat16>>, dlogits<operand_t<float16>>, dlogits<operand_t<double>>},
    {dhidden<float>, dhidden<bfloat16>, dhidden<float16>, dhidden<double>},
    {dweight<float>, dweight<bfloat16>, dweight<float16>, dweight<double>},
    {dbias<float>, dbias<float>, dbias<float>, dbias<double>},
};

}  // namespace fastlm::FASTLM_CPU_LEVEL
