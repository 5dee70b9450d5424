// Which tile a block works on next. Tiles of a group follow each other, in bands of kBand tiles of rows: blocks that run at the
// same time share columns of B, whose lines then come from the second-level cache, and few enough rows of A that those stay
// there.
#pragma once

#include "core/cuda/device.cuh"
#include "core/cuda/gemm/problem.h"

namespace fastlm::cuda::gemm {

constexpr int64_t kBand = 16;

struct Range {
  int64_t begin, end;
};

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Rows of group g.
__device__ __forceinline__ Range rows_of(const Ragged& r, int64_t g) {
  if (r.offsets == nullptr) return {0, r.count == nullptr ? r.rows : clamped(*r.count - r.first, 0, r.rows)};
  const int64_t begin = clamped(load_index(r.offsets, r.wide, g), 0, r.rows);
  return {begin, clamped(load_index(r.offsets, r.wide, g + 1), begin, r.rows)};
}

// The first element of a line.
template <class T>
__device__ __forceinline__ const T* line_of(const Matrix& m, int64_t group, int64_t line) {
  if (m.index != nullptr) line = clamped(m.index[line], 0, m.lines - 1);
  return static_cast<const T*>(m.data) + group * m.group_stride + line * m.line_stride;
}

struct Tile {
  int64_t group;
  int64_t row, row_end;  // first row of the tile; end of the group's rows (or m)
  int64_t column;        // first column, of a part
  Range depth;           // outer product: the group's rows; else nothing
};

// Place of tile `number` among `row_tiles` x `column_tiles`.
template <class Found>
__device__ __forceinline__ void place_in_bands(int64_t number, int64_t row_tiles, int64_t column_tiles, Found&& found) {
  const int64_t band = number / (kBand * column_tiles), within = number - band * kBand * column_tiles;
  const int64_t first = band * kBand, height = row_tiles - first < kBand ? row_tiles - first : kBand;
  found(first + within % height, within / height);
}

// Tiles number, number + step, ... of a row product; numbers only grow, so groups are passed once.
template <int kRows, int kColumns>
class RowTiles {
 public:
  __device__ __forceinline__ RowTiles(const Ragged& rows, int64_t n, int64_t first, int64_t step)
      : ragged_(rows), column_tiles_((n + kColumns - 1) / kColumns), number_(first - step), step_(step) {}

  __device__ __forceinline__ bool next(Tile& tile) {
    number_ += step_;
    while (true) {
      if (group_ >= ragged_.groups) return false;
      if (!known_) {
        range_ = rows_of(ragged_, group_);
        row_tiles_ = (range_.end - range_.begin + kRows - 1) / kRows;
        known_ = true;
      }
      if (number_ - passed_ < row_tiles_ * column_tiles_) break;
      passed_ += row_tiles_ * column_tiles_;
      ++group_;
      known_ = false;
    }
    place_in_bands(number_ - passed_, row_tiles_, column_tiles_, [&](int64_t row, int64_t column) {
      tile = {group_, range_.begin + row * kRows, range_.end, column * kColumns, {}};
    });
    return true;
  }

 private:
  const Ragged& ragged_;
  const int64_t column_tiles_;
  int64_t number_;
  const int64_t step_;
  int64_t group_ = 0, passed_ = 0, row_tiles_ = 0;
  Range range_{};
  bool known_ = false;
};

// The same for an outer product, every group of which has the same tiles.
template <int kRows, int kColumns>
class OuterTiles {
 public:
  __device__ __forceinline__ OuterTiles(const Ragged& rows, int64_t m, int64_t n, int64_t first, int64_t step)
      : ragged_(rows),
        m_(m),
        row_tiles_((m + kRows - 1) / kRows),
        column_tiles_((n + kColumns - 1) / kColumns),
        number_(first - step),
        step_(step) {}

  __device__ __forceinline__ bool next(Tile& tile) {
    number_ += step_;
    const int64_t each = row_tiles_ * column_tiles_, group = each == 0 ? ragged_.groups : number_ / each;
    if (group >= ragged_.groups) return false;
    place_in_bands(number_ - group * each, row_tiles_, column_tiles_, [&](int64_t row, int64_t column) {
      tile = {group, row * kRows, m_, column * kColumns, rows_of(ragged_, group)};
    });
    return true;
  }

 private:
  const Ragged& ragged_;
  const int64_t m_, row_tiles_, column_tiles_;
  int64_t number_;
  const int64_t step_;
};

// The most tiles a row product can have: every group may end in a tile of its own.
inline int64_t most_row_tiles(const Ragged& r, int64_t n, int64_t tile_rows, int64_t tile_columns) {
  if (r.rows == 0 || n == 0) return 0;
  const int64_t partial = r.offsets == nullptr ? 0 : (r.groups < r.rows ? r.groups : r.rows);
  return ((r.rows + tile_rows - 1) / tile_rows + partial) * ((n + tile_columns - 1) / tile_columns);
}

}  // namespace fastlm::cuda::gemm
