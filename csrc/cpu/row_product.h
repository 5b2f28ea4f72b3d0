// Products with a matrix given by rows, as backward needs them: out (+)= a . w with w (K, columns),
// packed into panels or in PyTorch's own layout.
#pragma once

#include "pack.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct RowWeights {
  const scalar_t* plain;   // (K, columns)
  const scalar_t* packed;  // panels of pack_rows, or null
  int64_t k_size;
};

// The part [k, k + depth) of w for the columns of one panel. Plain rows may end within a vector:
// those last columns are added one by one.
template <class scalar_t>
void panel_product(const Panels<scalar_t>& panels, int64_t p, int64_t rows, bool add, int64_t k,
                   int64_t depth, const scalar_t* a, int64_t a_row, const RowWeights<scalar_t>& w,
                   scalar_t* out, int64_t out_row) {
  constexpr int64_t lanes = lanes_of<scalar_t>;
  const int64_t valid = panels.valid(p), column = panels.first(p);
  const scalar_t* plain = w.packed ? nullptr : w.plain + k * panels.units + column;
  const WeightPanel<const scalar_t> panel =
      w.packed
          ? packed_panel(panels, p, w.k_size, w.packed, k)
          : WeightPanel<const scalar_t>{plain, panels.units, slice_vectors(kMaxVectors) * lanes};
  const Operands<scalar_t> o{depth, a + k, a_row, 1, panel, nullptr, 0, out + column, out_row};
  const int64_t whole = w.packed ? valid : valid / lanes * lanes;
  if (whole > 0) multiply_columns(rows, whole, add, o);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = whole; c < valid; ++c) {
      scalar_t sum = 0;
      for (int64_t i = 0; i < depth; ++i) sum += o.a[r * a_row + i] * plain[i * panels.units + c];
      o.out[r * out_row + c] = add ? o.out[r * out_row + c] + sum : sum;
    }
}

// out (+)= a . w for the columns of the panels in `range`. k goes in parts, and the panels within a
// part: that of a packed panel stays in the cache, and few plain rows are read along memory, not
// across it.
template <class scalar_t>
void row_product(const Panels<scalar_t>& panels, Range range, int64_t rows, bool add,
                 const scalar_t* a, int64_t a_row, const RowWeights<scalar_t>& w, scalar_t* out,
                 int64_t out_row) {
  const int64_t depth = w.packed ? 2 * kBlock : kBlock / 4;
  for (int64_t k = 0; k < w.k_size; k += depth)
    for (int64_t p = range.begin; p < range.end; ++p)
      panel_product(panels, p, rows, add || k > 0, k, smaller(depth, w.k_size - k), a, a_row, w,
                    out, out_row);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
