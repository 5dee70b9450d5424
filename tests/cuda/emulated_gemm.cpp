// The products of core/cuda/gemm on the emulated device against plain loops, on small whole numbers, so that every sum is exact:
//     emulated_gemm BACKEND    fma, mma, stream, hopper, or pairs (hopper, clusters of two blocks for every product)
// Whatever a product must not read is NaN, whatever it must not write stays as it was. Ends with status 1 and a line for each
// product that is wrong.
#include "core/cuda/gemm/gemm.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace fastlm;
using namespace fastlm::cuda;
using namespace fastlm::cuda::gemm;

// Two parts, each to a matrix of its own.
template <class T>
struct StoreParts {
  static constexpr int kParts = 2;
  Output first, second;

  template <int kCount, class A>
  void operator()(const Slab& slab, A (&d)[kCount]) const {
    store_slab<T, kCount / 2>(slab, first, d);
    store_slab<T, kCount / 2>(slab, second, d + kCount / 2);
  }
};

struct Case {
  std::string name;
  std::vector<int64_t> sizes;  // rows of the groups
  int64_t before, after;       // rows in front of the first and behind the last group
  int64_t n, k;                // columns of a part; depth, or m of an outer product
  int64_t padding;             // elements behind each line
  bool index, count;
};

template <class T>
T number(double x) {
  return from_acc<T>(static_cast<acc_t<T>>(x));
}

template <class T>
struct Lines {
  std::vector<T> data;
  int64_t columns, stride;
  Lines(int64_t lines, int64_t columns, int64_t padding)
      : data(static_cast<size_t>(lines * (columns + padding) + 8), number<T>(NAN)), columns(columns), stride(columns + padding) {}
  T& at(int64_t line, int64_t column) { return data[static_cast<size_t>(line * stride + column)]; }
  double value(int64_t line, int64_t column) { return to_acc(at(line, column)); }
  void fill(int64_t line, std::mt19937& random) {
    for (int64_t i = 0; i < columns; ++i) at(line, i) = number<T>(static_cast<double>(static_cast<int>(random() % 3) - 1));
  }
};

int failures = 0;
bool pairs = false;

template <class T, Layout kB, class Epilogue>
cudaError_t run_row(Backend backend, const RowProduct& p, const Epilogue& epilogue) {
  if constexpr (sizeof(T) == 2) {
    if (pairs) return run_hopper_row<T, kB, 2>(p, epilogue, nullptr);
  }
  return row_product<T, kB>(backend, p, epilogue, nullptr);
}
template <class T, class Epilogue>
cudaError_t run_outer(Backend backend, const OuterProduct& p, const Epilogue& epilogue) {
  if constexpr (sizeof(T) == 2) {
    if (pairs) return run_hopper_outer<T, 2>(p, epilogue, nullptr);
  }
  return outer_product<T>(backend, p, epilogue, nullptr);
}

void report(const Case& c, const char* what, int64_t row, int64_t column, double found, double wanted) {
  if (++failures <= 20) {
    std::printf("%s: %s (%ld, %ld) is %g instead of %g\n", c.name.c_str(), what, static_cast<long>(row),
                static_cast<long>(column), found, wanted);
  }
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

struct Setup {
  std::vector<int64_t> offsets;
  std::vector<int32_t> index;
  int32_t count = 0;
  Ragged rows{};

  Setup(const Case& c, std::mt19937& random) {
    int64_t total = c.before;
    offsets.push_back(total);
    for (const int64_t size : c.sizes) offsets.push_back(total += size);
    rows = {offsets.data(), true, static_cast<int64_t>(c.sizes.size()), total + c.after, nullptr, 0};
    if (c.count) {
      count = static_cast<int32_t>(c.sizes[0] + 5);
      rows = {nullptr, false, 1, c.sizes[0] + c.after, &count, 5};
      offsets = {0, c.sizes[0]};
    }
    for (int64_t i = 0; i < rows.rows; ++i) index.push_back(static_cast<int32_t>(i));
    if (c.index) std::shuffle(index.begin(), index.end(), random);
  }
};

template <class T, Layout kB, int kParts>
void row_case(Backend backend, const Case& c) {
  std::mt19937 random(7);
  Setup s(c, random);
  const int64_t groups = s.rows.groups, rows = s.rows.rows, columns = c.n * kParts;
  Lines<T> a(rows, c.k, c.padding);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = s.offsets[g]; r < s.offsets[g + 1]; ++r) a.fill(s.index[r], random);
  }
  const int64_t lines = kB == Layout::kDepth ? columns : c.k;
  Lines<T> b(groups * lines, kB == Layout::kDepth ? c.k : columns, c.padding);
  for (int64_t i = 0; i < groups * lines; ++i) b.fill(i, random);
  Lines<T> out(rows, c.n, c.padding), second(rows, c.n, c.padding);
  RowProduct p{s.rows,
               c.n,
               c.k,
               {a.data.data(), a.stride, 0, c.index ? s.index.data() : nullptr, rows},
               {b.data.data(), b.stride, lines * b.stride, nullptr, lines}};
  cudaError_t status;
  if constexpr (kParts == 1) {
    status = run_row<T, kB>(backend, p, Store<T>{{out.data.data(), out.stride, 0}});
  } else {
    status = run_row<T, kB>(backend, p, StoreParts<T>{{out.data.data(), out.stride, 0}, {second.data.data(), second.stride, 0}});
  }
  if (status != cudaSuccess) report(c, "status", 0, 0, status, 0);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t group = -1;
    for (int64_t g = 0; g < groups; ++g) {
      if (r >= s.offsets[g] && r < s.offsets[g + 1]) group = g;
    }
    for (int64_t i = 0; i < out.stride; ++i) {
      for (int part = 0; part < kParts; ++part) {
        double wanted = NAN;
        if (group >= 0 && i < c.n) {
          wanted = 0;
          for (int64_t k = 0; k < c.k; ++k) {
            const int64_t n = part * c.n + i;
            wanted +=
                a.value(s.index[r], k) * (kB == Layout::kDepth ? b.value(group * lines + n, k) : b.value(group * lines + k, n));
          }
        }
        const double found = (part == 0 ? out : second).value(r, i);
        if (!same(found, wanted)) report(c, part == 0 ? "out" : "second part", r, i, found, wanted);
      }
    }
  }
}

template <class T>
void outer_case(Backend backend, const Case& c) {
  std::mt19937 random(11);
  Setup s(c, random);
  const int64_t groups = s.rows.groups, rows = s.rows.rows, m = c.k;
  Lines<T> a(rows, m, c.padding), b(rows, c.n, c.padding);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = s.offsets[g]; r < s.offsets[g + 1]; ++r) {
      a.fill(s.index[r], random);
      b.fill(s.index[r], random);
    }
  }
  Lines<T> out(groups * m, c.n, c.padding);
  const auto* index = c.index ? s.index.data() : nullptr;
  const OuterProduct p{s.rows, m, c.n, {a.data.data(), a.stride, 0, index, rows}, {b.data.data(), b.stride, 0, index, rows}};
  const cudaError_t status = run_outer<T>(backend, p, Store<T>{{out.data.data(), out.stride, m * out.stride}});
  if (status != cudaSuccess) report(c, "status", 0, 0, status, 0);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < out.stride; ++j) {
        double wanted = j < c.n ? 0 : NAN;
        for (int64_t r = s.offsets[g]; j < c.n && r < s.offsets[g + 1]; ++r) {
          wanted += a.value(s.index[r], i) * b.value(s.index[r], j);
        }
        const double found = out.value(g * m + i, j);
        if (!same(found, wanted)) report(c, "out", g * m + i, j, found, wanted);
      }
    }
  }
}

template <class T>
void all_cases(Backend backend, const char* dtype) {
  const std::vector<Case> cases = {
      {"one group", {130}, 0, 0, 72, 40, 0, false, false},
      {"small", {1}, 0, 0, 1, 1, 0, false, false},
      {"ragged", {3, 0, 129, 64, 0, 17}, 0, 0, 136, 72, 8, false, false},
      {"rows outside of groups", {5, 0, 20}, 3, 9, 264, 88, 8, false, false},
      {"deep", {33, 150}, 0, 1, 40, 200, 0, false, false},
      {"more steps than stages", {150, 0, 140}, 1, 2, 264, 328, 0, false, false},
      {"unaligned", {7, 131}, 1, 2, 67, 37, 3, false, false},
      {"picked rows", {9, 60, 0, 5}, 0, 4, 80, 48, 0, true, false},
      {"counted", {70}, 0, 190, 96, 64, 8, false, true},
      {"nothing", {0, 0}, 0, 3, 16, 16, 0, false, false},
  };
  for (Case c : cases) {
    // What tile copies cannot address is another backend's.
    if (backend == Backend::kHopper && (c.index || c.padding % 8 != 0 || c.n % 8 != 0 || c.k % 8 != 0)) continue;
    const std::string name = std::string(dtype) + ", " + c.name;
    c.name = name + ", B by depth";
    row_case<T, Layout::kDepth, 1>(backend, c);
    c.name = name + ", B by width";
    row_case<T, Layout::kWidth, 1>(backend, c);
    c.name = name + ", two parts";
    row_case<T, Layout::kDepth, 2>(backend, c);
    c.name = name + ", outer";
    outer_case<T>(backend, c);
  }
}

// What eight lanes read (ldmatrix) or write (cp.async) at a time lies in eight different groups of four banks.
template <class S, Layout kLayout>
void check_banks(const char* name) {
  const auto check = [&](const char* what, auto offset) {
    int groups = 0;
    for (int lane = 0; lane < 8; ++lane) groups |= 1 << offset(lane) / 16 % 8;
    if (groups != 255 && ++failures <= 20) std::printf("%s: bank conflicts of %s\n", name, what);
  };
  constexpr bool kByDepth = kLayout == Layout::kDepth;
  for (int line = 0; line < S::kLines; line += 8) {
    for (int depth = 0; depth < S::kDepth; depth += 8) {
      check("ldmatrix", [&](int i) { return S::template at<kLayout>(line + (kByDepth ? i : 0), depth + (kByDepth ? 0 : i)); });
    }
  }
  constexpr int kPieces = (kByDepth ? S::kDepth : S::kLines) / 8;
  for (int first = 0; first < S::kBytes / 16; first += 8) {
    check("cp.async", [&](int i) {
      const int along = (first + i) % kPieces * 8, across = (first + i) / kPieces;
      return S::template at<kLayout>(kByDepth ? across : along, kByDepth ? along : across);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "fma") {
    all_cases<float>(Backend::kFma, "float32");
    all_cases<double>(Backend::kFma, "float64");
  } else if (name == "mma" || name == "stream" || name == "hopper" || name == "pairs") {
    pairs = name == "pairs";
    const Backend backend = name == "mma" ? Backend::kMma : name == "stream" ? Backend::kStream : Backend::kHopper;
    check_banks<MmaShape::Stage, Layout::kDepth>("mma, by depth");
    check_banks<MmaShape::Stage, Layout::kWidth>("mma, by width");
    check_banks<StreamShape::Lines, Layout::kDepth>("stream, by depth");
    check_banks<StreamShape::Lines, Layout::kWidth>("stream, by width");
    check_banks<StreamShape::Rows, Layout::kDepth>("stream, rows");
    all_cases<bfloat16>(backend, "bfloat16");
    all_cases<float16>(backend, "float16");
  } else {
    std::printf("unknown backend '%s'\n", name.c_str());
    return 2;
  }
  return failures == 0 ? 0 : 1;
}
