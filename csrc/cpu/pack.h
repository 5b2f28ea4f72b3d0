// Weights in the order in which the micro-kernel reads them: panels of a few vectors, k by k. With
// 16 registers a panel of four is two slices, the second behind all of the first (gemm.h).
//
// Two sources. `pack_units`: PyTorch's (gates*units, K), where a panel holds per_gate()
// vectors of units with all their gates, so that the gates of a unit meet in one tile. `pack_rows`:
// any (K, columns) matrix given row by row, panels of kMaxVectors vectors of columns. Lanes beyond
// the last unit or column are zero. The last panel may be narrower.
#pragma once

#include <cstddef>
#include <utility>

#include "gemm.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct Range {
  int64_t begin, end;
  RNNFAST_HD int64_t size() const { return end - begin; }
};

// Part `index` of `count` nearly equal parts of [0, size).
RNNFAST_HD Range part_of(int64_t size, int64_t index, int64_t count) {
  return {size * index / count, size * (index + 1) / count};
}

// How `units` (or columns) with `gates` each are cut into panels.
template <class scalar_t>
struct Panels {
  static constexpr int64_t kLanes = lanes_of<scalar_t>;
  int64_t units;
  int gates;

  // Vectors of units in a full panel.
  RNNFAST_HD int per_gate() const { return gates == 1 ? kMaxVectors : 1; }
  RNNFAST_HD int64_t width() const { return per_gate() * kLanes; }  // units in a full panel
  RNNFAST_HD int64_t count() const { return divide_up(units, width()); }
  RNNFAST_HD int64_t first(int64_t panel) const { return panel * width(); }
  RNNFAST_HD int64_t valid(int64_t panel) const { return smaller(width(), units - first(panel)); }
  RNNFAST_HD int vectors_per_gate(int64_t panel) const {
    return static_cast<int>(divide_up(valid(panel), kLanes));
  }
  RNNFAST_HD int vectors(int64_t panel) const { return gates * vectors_per_gate(panel); }
  // Elements before a panel, for every k: also the column
  // at which its results start in a row of gx.
  RNNFAST_HD int64_t offset(int64_t panel) const { return panel * width() * gates; }
  RNNFAST_HD int64_t padded() const { return gates * divide_up(units, kLanes) * kLanes; }
};

// Panel p of packed weights, from element k of k_size on.
template <class acc_t, class weight_t>
RNNFAST_HD WeightPanel<weight_t> packed_panel(const Panels<acc_t>& panels, int64_t p,
                                              int64_t k_size, weight_t* packed, int64_t k = 0) {
  const int64_t stride = slice_vectors(panels.vectors(p)) * lanes_of<acc_t>;
  return {packed + panels.offset(p) * k_size + k * stride, stride, stride * k_size};
}

// The units (or columns) of a range of panels.
template <class scalar_t>
Range columns_of(const Panels<scalar_t>& panels, Range range) {
  return {smaller(panels.first(range.begin), panels.units),
          smaller(panels.first(range.end), panels.units)};
}

// --- transposition of a square of lanes x lanes elements, in log2(lanes) rounds of swaps ---

template <int stage, class V, std::size_t... lane>
RNNFAST_HD void swap_lanes(V& a, V& b, std::index_sequence<lane...>) {
  constexpr int n = sizeof...(lane);
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(
      a, b, ((lane & stage) ? static_cast<int>(lane) - stage + n : static_cast<int>(lane))...);
  const V high = __builtin_shufflevector(
      a, b, ((lane & stage) ? static_cast<int>(lane) + n : static_cast<int>(lane) + stage)...);
#else
  using I = typename Lanes<V>::int_t;
  const V low = __builtin_shuffle(
      a, b, I{((lane & stage) ? static_cast<int>(lane) - stage + n : static_cast<int>(lane))...});
  const V high = __builtin_shuffle(
      a, b, I{((lane & stage) ? static_cast<int>(lane) + n : static_cast<int>(lane) + stage)...});
#endif
  a = low;
  b = high;
}

template <int stage, class V, int n>
RNNFAST_HD void transpose_from(V (&square)[n]) {
  if constexpr (stage < n) {
    RNNFAST_UNROLL
    for (int i = 0; i < n; ++i)
      if (!(i & stage))
        swap_lanes<stage>(square[i], square[i + stage], std::make_index_sequence<n>{});
    transpose_from<2 * stage>(square);
  }
}

// out[k*out_k + lane] = w[lane*w_row + k] for `rows` <= lanes rows, zero in the lanes beyond.
template <class weight_t>
void pack_vector(int64_t rows, int64_t k_size, const weight_t* w, int64_t w_row, weight_t* out,
                 int64_t out_k) {
  using V = vector_of<accumulator_of<weight_t>>;
  constexpr int n = static_cast<int>(lanes_of<accumulator_of<weight_t>>);
  int64_t k = 0;
  for (; k + n <= k_size; k += n) {
    V square[n];
    RNNFAST_UNROLL
    for (int i = 0; i < n; ++i) square[i] = i < rows ? load_wide(w + i * w_row + k) : V{};
    transpose_from<1>(square);
    RNNFAST_UNROLL
    for (int i = 0; i < n; ++i) store_narrow(out + (k + i) * out_k, square[i]);
  }
  for (; k < k_size; ++k)
    for (int i = 0; i < n; ++i) out[k * out_k + i] = i < rows ? w[i * w_row + k] : weight_t{};
}

template <class acc_t, class weight_t>
void pack_units(const Panels<acc_t>& panels, int64_t panel, int64_t k_size, const weight_t* w,
                weight_t* packed) {
  constexpr int64_t lanes = lanes_of<acc_t>;
  const int vectors = panels.vectors_per_gate(panel), slice = slice_vectors(panels.vectors(panel));
  const WeightPanel<weight_t> out = packed_panel(panels, panel, k_size, packed);
  for (int g = 0; g < panels.gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const int64_t unit = panels.first(panel) + v * lanes;
      pack_vector(smaller(lanes, panels.units - unit), k_size,
                  w + (g * panels.units + unit) * k_size, k_size,
                  out.vector(g * vectors + v, slice, lanes), out.k_stride);
    }
}

// A (gates*units) vector in the same order: the accumulators' start values.
template <class acc_t, class bias_t>
void pack_bias(const Panels<acc_t>& panels, int64_t panel, const bias_t* bias, acc_t* packed) {
  constexpr int64_t lanes = lanes_of<acc_t>;
  const int vectors = panels.vectors_per_gate(panel);
  acc_t* out = packed + panels.offset(panel);
  for (int g = 0; g < panels.gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const int64_t unit = panels.first(panel) + v * lanes;
      store(out + (g * vectors + v) * lanes,
            load_wide_part(bias + g * panels.units + unit, panels.units - unit));
    }
}

// `row(k)` gives row k of a (K, columns) matrix, or null for zeros.
template <class scalar_t, class RowOf>
void pack_rows(const Panels<scalar_t>& panels, int64_t panel, int64_t k_size, const RowOf& row,
               scalar_t* packed) {
  constexpr int64_t lanes = lanes_of<scalar_t>;
  using V = vector_of<scalar_t>;
  const int vectors = panels.vectors(panel);
  const int64_t column = panels.first(panel);
  const int slice = slice_vectors(vectors);
  WeightPanel<scalar_t> out = packed_panel(panels, panel, k_size, packed);
  for (int64_t k = 0; k < k_size; ++k, out.w += out.k_stride) {
    const scalar_t* from = row(k);
    for (int v = 0; v < vectors; ++v)
      store(out.vector(v, slice, lanes),
            from ? load_part(from + column + v * lanes, panels.units - column - v * lanes) : V{});
  }
}

// --- scratch memory: the same code first measures it, then hands it out ---

struct Arena {
  char* base = nullptr;  // null while measuring
  int64_t used = 0;

  template <class scalar_t>
  RNNFAST_HD scalar_t* take(int64_t count) {
    scalar_t* place = base ? reinterpret_cast<scalar_t*>(base + used) : nullptr;
    // 64 more, so that no two parts lie at a distance of 4 KiB.
    used += divide_up(count * static_cast<int64_t>(sizeof(scalar_t)), 64) * 64 + 64;
    return place;
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
