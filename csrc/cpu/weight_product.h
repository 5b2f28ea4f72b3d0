// Gradients of weights: out (+)= left^T . right, a sum over rows, for several right sides at once.
// Left sides are packed tile by tile, since their rows lie across memory; right sides come in
// panels (pack_rows).
#pragma once

#include "pack.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int64_t kLeftTiles = 8;  // tiles of the left side that are packed together

// Elements that weight_product wants at `tiles`.
template <class scalar_t>
int64_t left_tiles_size(int64_t rows, int64_t together = kLeftTiles) {
  return together * (tile_rows(kMaxVectors) * rows + kMaxRows + lanes_of<scalar_t>);
}

// A right side in panels and the gradient that it leads to; null: not asked for.
template <class scalar_t>
struct Right {
  const Panels<scalar_t>& panels;
  const scalar_t* packed;
  scalar_t* out;

  scalar_t* place(int64_t m, int64_t p) const { return out + m * panels.units + panels.first(p); }
};

// Where the tile of column i starts: behind each tile is room for what its last vector runs over.
template <class scalar_t>
int64_t tile_offset(int64_t i, int64_t rows) {
  return i * rows + i / tile_rows(kMaxVectors) * lanes_of<scalar_t>;
}

// Columns of the left side, from m on, as tiles, k by k. Several tiles at a time, so that a cache
// line is fetched once; whole vectors, so that what runs over a row of the tile is overwritten by
// the next row.
template <class scalar_t, class Left>
void pack_left(int64_t rows, int64_t m, int64_t height, const Left& left, scalar_t* tiles) {
  constexpr int64_t kTileRows = tile_rows(kMaxVectors), kLanes = lanes_of<scalar_t>;
  const int64_t tile = tile_offset<scalar_t>(kTileRows, rows);
  for (int64_t k = 0; k < rows; ++k) {
    const scalar_t* from = left(k) + m;
    scalar_t* to = tiles + k * kTileRows;
    for (int64_t i = 0; i < height; i += kTileRows, from += kTileRows, to += tile)
      for (int64_t v = 0; v < kTileRows; v += kLanes) store(to + v, load(from + v));
  }
}

// out[m] (+)= sum over rows k of left(k)[m] * right[k], for the rows m of the result in `range`.
// Rows of the left side are read in whole tiles, and those in whole vectors: behind the end of one,
// fewer than a vector and kMaxRows elements.
template <class scalar_t, class Left, int n>
void weight_product(Range range, int64_t rows, bool first, const Left& left,
                    const Right<scalar_t> (&rights)[n], scalar_t* tiles,
                    int64_t together = kLeftTiles) {
  bool wanted = false;
  for (const auto& right : rights) wanted = wanted || right.out;
  if (!wanted) return;
  constexpr int64_t kTileRows = tile_rows(kMaxVectors);
  for (int64_t m = range.begin; m < range.end; m += together * kTileRows) {
    const int64_t height = smaller(range.end - m, together * kTileRows);
    pack_left(rows, m, height, left, tiles);
    for (const auto& right : rights) {
      if (!right.out) continue;
      for (int64_t p = 0; p < right.panels.count(); ++p)
        for (int64_t i = 0; i < height; i += kTileRows)
          multiply_columns(
              smaller(kTileRows, height - i), right.panels.valid(p), !first,
              Operands<scalar_t>{rows, tiles + tile_offset<scalar_t>(i, rows), 1, kTileRows,
                                 packed_panel(right.panels, p, rows, right.packed), nullptr, 0,
                                 right.place(m + i, p), right.panels.units});
    }
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
