// Gradients of a weight for each of several samples, whose rows are side by side in a batch:
//   out[v] = sum over the rows of sample v of left^T . right
#pragma once

#include "dispatch.h"
#include "weight_product.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int64_t kSampleRows = 512;  // that are packed together

// Elements behind the end of a row that pack_left may read.
template <class scalar_t>
constexpr int64_t kReadBeyond = lanes_of<scalar_t> + kMaxRows;

// The rows of a sample lie far apart, at distances that may share their place in the caches: whole
// rows of the left side are read, as far as the second cache holds the tiles.
template <class scalar_t>
int64_t tiles_together(int64_t rows, int64_t columns) {
  constexpr int64_t kTileRows = tile_rows(kMaxVectors), kBytes = 256 << 10;
  const int64_t fit = kBytes / (rows * kTileRows * static_cast<int64_t>(sizeof(scalar_t)));
  return smaller(divide_up(columns, kTileRows), fit);
}

template <class scalar_t>
struct SampleScratch {
  scalar_t *right, *tiles, *copy;
};

template <class scalar_t>
SampleScratch<scalar_t> sample_scratch(const SampleProduct<scalar_t>& p, Arena& arena) {
  const int64_t rows = smaller(p.steps * p.batch, kSampleRows);
  return {
      arena.take<scalar_t>(Panels<scalar_t>{p.columns, 1}.padded() * rows),
      arena.take<scalar_t>(left_tiles_size<scalar_t>(rows, tiles_together<scalar_t>(rows, p.rows))),
      arena.take<scalar_t>(p.rows + kReadBeyond<scalar_t>)};
}

// The samples from `begin` to `end`.
template <class scalar_t>
void sample_product(const SampleProduct<scalar_t>& p, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory, 0};
  const SampleScratch<scalar_t> scratch = sample_scratch(p, arena);
  const Panels<scalar_t> panels{p.columns, 1};
  const int64_t count = p.steps * p.batch;

  // Whole vectors are read, so the last rows of the left side go through a copy with room behind.
  const int64_t all = p.samples * count;
  const int64_t first_copied = all - divide_up(kReadBeyond<scalar_t>, p.rows);
  for (int64_t v = begin; v < end; ++v) {
    const auto row = [&](int64_t k) {
      return ((k / p.batch) * p.samples + v) * p.batch + k % p.batch;
    };
    for (int64_t k0 = 0; k0 < count; k0 += kSampleRows) {
      const int64_t rows = smaller(count - k0, kSampleRows);
      for (int64_t i = 0; i < panels.count(); ++i)
        pack_rows(
            panels, i, rows, [&](int64_t k) { return p.right + row(k0 + k) * p.columns; },
            scratch.right);
      const auto left = [&](int64_t k) -> const scalar_t* {
        const int64_t at = row(k0 + k);
        const scalar_t* from = p.left + at * p.rows;
        if (at < first_copied) return from;
        for (int64_t m = 0; m < p.rows; ++m) scratch.copy[m] = from[m];
        return scratch.copy;
      };
      const Right<scalar_t> right{panels, scratch.right, p.out + v * p.rows * p.columns};
      weight_product(Range{0, p.rows}, rows, k0 == 0, left, {right}, scratch.tiles,
                     tiles_together<scalar_t>(smaller(count, kSampleRows), p.rows));
    }
  }
}

template <class scalar_t>
int64_t sample_bytes(const SampleProduct<scalar_t>& p) {
  Arena arena;
  sample_scratch(p, arena);
  return arena.used;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
