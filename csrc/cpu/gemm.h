// The micro-kernels: a tile of rows times a panel of weights, accumulators in registers.
//
// Two kernels: `multiply` broadcasts an element of a row against vectors of the panel (packed
// weights, or any matrix whose rows are contiguous), `multiply_direct` takes dot products with
// PyTorch's (units, K) layout. Each adds its products in one fixed order (partial sums over k, or
// one sum a lane), so an entry has the same bits whatever tile, thread or number of threads
// computes it.
#pragma once

#include "convert.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int kMaxVectors = 4;   // vectors a panel is wide
constexpr int kMaxRows = 8;      // rows of a tile
constexpr int64_t kBlock = 256;  // products in a partial sum
// Weights come from the second cache, whose prefetcher leaves the way to the first to the program:
// this many bytes early (5 to 15 % here where a panel exceeds the first cache).
constexpr int64_t kAhead = 2048;

// Accumulators, the vectors of weights (or the rows' elements) and one of the other must fit the
// registers: of 16, 12 are accumulators.
constexpr int max_rows(int vectors) {
  const int fit = kVectorRegisters == 32 ? (32 - vectors - 1) / vectors : 12 / vectors;
  return fit < kMaxRows ? fit : kMaxRows;
}

// A panel lies in memory as slices of so many vectors, each of all of k. With 16 registers a tile
// of six rows and half a panel reads half of the weights that one of three rows and a panel reads.
constexpr int slice_vectors(int vectors) {
  return kVectorRegisters == 16 && vectors == kMaxVectors ? 2 : vectors;
}

// Rows that a product of so many vectors takes best together.
constexpr int tile_rows(int vectors) { return max_rows(slice_vectors(vectors)); }

// Where the vectors of a panel are, each k `k_stride` behind the one before; `slice`:
// slice_vectors.
template <class weight_t>
struct WeightPanel {
  weight_t* w;
  int64_t k_stride, slice_stride;

  RNNFAST_HD weight_t* vector(int v, int slice, int64_t lanes) const {
    return w + v / slice * slice_stride + v % slice * lanes;
  }
};

// Weights may be of a smaller type than the sums; they are widened as they are loaded.
template <class scalar_t, class weight_t = scalar_t>
struct Operands {
  int64_t k_size;
  const scalar_t* a;  // row r, element k at a[r*a_row + k*a_k]
  int64_t a_row, a_k;
  WeightPanel<const weight_t> panel;
  const scalar_t* start;  // start values at start[r*start_row + ...]; null: zero
  int64_t start_row;
  scalar_t* out;
  int64_t out_row;
};

template <class scalar_t, class weight_t, int kRows, int kVectors>
__attribute__((noinline)) void tile(const Operands<scalar_t, weight_t>& o) {
  using V = vector_of<scalar_t>;
  constexpr int64_t lanes = lanes_of<scalar_t>;
  constexpr int kSlice = slice_vectors(kVectors);
  // Few rows keep their elements in registers while the weights pass by, many rows the weights.
  constexpr bool kHoldRows = kHolds && kRows > 1 && kRows <= kVectors;
  const scalar_t* a = o.a;
  WeightPanel<const weight_t> panel = o.panel;
  const int64_t a_row = o.a_row, a_k = o.a_k;
  // Partial sums of kBlock products each, started at zero, keep the
  // rounding error near that of a blocked library product; the start
  // value, which may be far larger than a product, comes in once.
  int64_t left = o.k_size;
  const scalar_t* start = o.start;
  int64_t start_row = o.start_row;
  do {
    V acc[kRows][kVectors] = {};
    for (int64_t k = smaller(left, kBlock); k > 0; --k) {
      const auto weights = [&](int v) {
        const weight_t* from = panel.vector(v, kSlice, lanes);
        if (v % kSlice * sizeof(V) % 64 == 0)  // a line of a k once
          __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
        return load_wide(from);
      };
      // x - 0 is x to the compiler, 0 + x is not
      const auto element = [&](int r) -> V { return a[r * a_row] - V{}; };
      if constexpr (kHoldRows) {
        V s[kRows];
        RNNFAST_UNROLL
        for (int r = 0; r < kRows; ++r) hold(s[r] = element(r));
        RNNFAST_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          V b = weights(v);
          hold(b);
          RNNFAST_UNROLL
          for (int r = 0; r < kRows; ++r) acc[r][v] += s[r] * b;
        }
      } else {
        V b[kVectors];
        RNNFAST_UNROLL
        for (int v = 0; v < kVectors; ++v) b[v] = weights(v);
        RNNFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const V s = element(r);
          RNNFAST_UNROLL
          for (int v = 0; v < kVectors; ++v) acc[r][v] += s * b[v];
        }
      }
      a += a_k;
      panel.w += panel.k_stride;
    }
    RNNFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      RNNFAST_UNROLL
      for (int v = 0; v < kVectors; ++v)
        store(o.out + r * o.out_row + v * lanes,
              start ? load(start + r * start_row + v * lanes) + acc[r][v] : acc[r][v]);
    }
    start = o.out;
    start_row = o.out_row;
    left -= kBlock;
  } while (left > 0);
}

template <class scalar_t, class weight_t, int kVectors>
void tile_of(int rows, const Operands<scalar_t, weight_t>& o) {
  switch (rows) {
    case 1: return tile<scalar_t, weight_t, 1, kVectors>(o);
    case 2: return tile<scalar_t, weight_t, 2, kVectors>(o);
    case 3: return tile<scalar_t, weight_t, 3, kVectors>(o);
    case 4:
      if constexpr (max_rows(kVectors) >= 4) return tile<scalar_t, weight_t, 4, kVectors>(o);
      break;
    case 5:
      if constexpr (max_rows(kVectors) >= 5) return tile<scalar_t, weight_t, 5, kVectors>(o);
      break;
    case 6:
      if constexpr (max_rows(kVectors) >= 6) return tile<scalar_t, weight_t, 6, kVectors>(o);
      break;
    case 7:
      if constexpr (max_rows(kVectors) >= 7) return tile<scalar_t, weight_t, 7, kVectors>(o);
      break;
    case 8:
      if constexpr (max_rows(kVectors) >= 8) return tile<scalar_t, weight_t, 8, kVectors>(o);
      break;
  }
  __builtin_unreachable();  // callers cut rows by max_rows
}

template <class scalar_t, class weight_t>
void tile_of(int rows, int vectors, const Operands<scalar_t, weight_t>& o) {
  switch (vectors) {
    case 1: return tile_of<scalar_t, weight_t, 1>(rows, o);
    case 2: return tile_of<scalar_t, weight_t, 2>(rows, o);
    case 3: return tile_of<scalar_t, weight_t, 3>(rows, o);
    default: return tile_of<scalar_t, weight_t, 4>(rows, o);
  }
}

// Calls use(first_row, rows) over [0, rows) in tiles of nearly equal height, none above `limit`.
template <class Use>
RNNFAST_HD void for_row_tiles(int64_t rows, int limit, const Use& use) {
  const int64_t tiles = divide_up(rows, limit);
  int64_t row = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t height = (rows - row) / (tiles - i);
    use(row, static_cast<int>(height));
    row += height;
  }
}

// out[r][0 .. vectors*lanes) = start + a[r] . w for any number of rows, none among them: few rows
// take the panel at once; of more, all take a slice, which the first cache may hold, then the next.
template <class scalar_t, class weight_t>
__attribute__((noinline)) void multiply(int64_t rows, int vectors,
                                        const Operands<scalar_t, weight_t>& all) {
  if (rows <= 0) return;
  if (rows <= max_rows(vectors)) return tile_of(static_cast<int>(rows), vectors, all);
  const int slice = slice_vectors(vectors);
  for (int v = 0; v < vectors; v += slice)
    for_row_tiles(rows, max_rows(slice), [&](int64_t row, int height) {
      const int64_t column = v * lanes_of<scalar_t>;
      Operands<scalar_t, weight_t> o = all;
      o.a += row * o.a_row;
      o.panel.w = o.panel.vector(v, slice, lanes_of<scalar_t>);
      if (o.start) o.start += row * o.start_row + column;
      o.out += row * o.out_row + column;
      tile_of(height, slice, o);
    });
}

// As multiply, writing only the first `columns` of each row and, with `add`, onto what out holds.
template <class scalar_t>
__attribute__((noinline)) void multiply_columns(int64_t rows, int64_t columns, bool add,
                                                const Operands<scalar_t>& all) {
  constexpr int64_t lanes = lanes_of<scalar_t>;
  const int vectors = static_cast<int>(divide_up(columns, lanes));
  if (columns == vectors * lanes) {
    Operands<scalar_t> o = all;
    o.start = add ? o.out : nullptr;
    o.start_row = o.out_row;
    return multiply(rows, vectors, o);
  }
  // A full vector would run past the row: go through a buffer.
  alignas(64) scalar_t buffer[kMaxRows][kMaxVectors * lanes];
  for_row_tiles(rows, tile_rows(vectors), [&](int64_t row, int height) {
    Operands<scalar_t> o = all;
    o.a += row * o.a_row;
    scalar_t* out = o.out + row * o.out_row;
    for (int r = 0; r < height; ++r)
      for (int64_t c = 0; c < columns; ++c)
        buffer[r][c] = add ? out[r * o.out_row + c] : scalar_t(0);
    for (int r = 0; r < height; ++r)
      for (int64_t c = columns; c < vectors * lanes; ++c) buffer[r][c] = scalar_t(0);
    o.start = o.out = &buffer[0][0];
    o.start_row = o.out_row = kMaxVectors * lanes;
    multiply(height, vectors, o);
    for (int r = 0; r < height; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r * all.out_row + c] = buffer[r][c];
  });
}

// sums[i] = the sum of the lanes of v[i], for n vectors together: halves are added to halves, two
// vectors to one, as long as there are vectors for it. Each sum is the same tree whatever n is.
template <class scalar_t, int n>
RNNFAST_HD void sum_all(const vector_of<scalar_t>* v, scalar_t* sums) {
  constexpr int lanes = static_cast<int>(lanes_of<scalar_t>);
  if constexpr (n % 2 || n < 2) {
    for (int i = 0; i < n; ++i) sums[i] = sum_lanes<scalar_t>(v[i]);
  } else {
    constexpr int kTogether = n % 16 == 0 && lanes >= 16 ? 16
                              : n % 8 == 0 && lanes >= 8 ? 8
                              : n % 4 == 0 && lanes >= 4 ? 4
                                                         : 2;
    for (int i = 0; i < n; i += kTogether) {
      vector_of<scalar_t> square[kTogether];
      RNNFAST_UNROLL
      for (int j = 0; j < kTogether; ++j) square[j] = v[i + j];
      const vector_of<scalar_t> folded = fold<scalar_t, kTogether>(square);
      // What kTogether vectors could not fold any further.
      scalar_t left[lanes];
      store(left, folded);
      constexpr int kEach = lanes / kTogether;
      for (int j = 0; j < kTogether; ++j) {
        for (int width = kEach / 2; width > 0; width /= 2)
          for (int l = 0; l < width; ++l) left[j * kEach + l] += left[j * kEach + l + width];
        sums[i + j] = left[j * kEach];
      }
    }
  }
}

template <class scalar_t, class weight_t, int kRows, int kUnits>
__attribute__((noinline)) void dot_tile(int64_t k_size, const scalar_t* a, int64_t a_row,
                                        const weight_t* w, int64_t w_row, const scalar_t* start,
                                        scalar_t* out, int64_t out_row) {
  using V = vector_of<scalar_t>;
  constexpr int64_t lanes = lanes_of<scalar_t>;
  V acc[kRows][kUnits] = {};
  int64_t k = 0;
  for (; k + lanes <= k_size; k += lanes) {
    V x[kRows];
    RNNFAST_UNROLL
    for (int r = 0; r < kRows; ++r) x[r] = load(a + r * a_row + k);
    RNNFAST_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      V b = load_wide(w + u * w_row + k);
      if constexpr (kHolds && kRows > 1) hold(b);
      RNNFAST_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][u] += x[r] * b;
    }
  }
  scalar_t sums[kRows * kUnits];
  sum_all<scalar_t, kRows * kUnits>(&acc[0][0], sums);
  for (int r = 0; r < kRows; ++r)
    for (int u = 0; u < kUnits; ++u) {
      scalar_t sum = sums[r * kUnits + u];
      for (int64_t i = k; i < k_size; ++i) sum += a[r * a_row + i] * widen_scalar(w[u * w_row + i]);
      out[r * out_row + u] = sum + (start ? start[u] : scalar_t(0));
    }
}

// out[r][u] = start[u] + a[r] . w[u] for `units` rows of w,
// each K long: no packing, made for few rows.
template <class scalar_t, class weight_t>
__attribute__((noinline)) void multiply_direct(int64_t rows, int64_t units, int64_t k_size,
                                               const scalar_t* a, int64_t a_row, const weight_t* w,
                                               int64_t w_row, const scalar_t* start, scalar_t* out,
                                               int64_t out_row) {
  // Units outside, rows inside: each weight comes from memory once, whatever the number of rows.
  const auto all_rows = [&](auto units_constant, int64_t u) {
    constexpr int kUnits = decltype(units_constant)::value;
    const auto block = [&](auto rows_constant, int64_t r) {
      dot_tile<scalar_t, weight_t, decltype(rows_constant)::value, kUnits>(
          k_size, a + r * a_row, a_row, w + u * w_row, w_row, start ? start + u : nullptr,
          out + r * out_row + u, out_row);
    };
    int64_t r = 0;
    if constexpr (kVectorRegisters == 32)
      for (; r + 4 <= rows; r += 4) block(Constant<4>{}, r);
    for (; r + 2 <= rows; r += 2) block(Constant<2>{}, r);
    for (; r < rows; ++r) block(Constant<1>{}, r);
  };
  int64_t u = 0;
  for (; u + 4 <= units; u += 4) all_rows(Constant<4>{}, u);
  for (; u < units; ++u) all_rows(Constant<1>{}, u);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
