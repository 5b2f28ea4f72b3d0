// Where the packed weights of a layer lie in one buffer: panels of w_ih, w_hh and w_hr, then, for
// bytes, their scales and sums.
#pragma once

#include "../cells/cell.h"
#include "formats.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Format>
struct PackedMatrix {
  const typename Format::weight_t* panels = nullptr;
  const float* scale = nullptr;
  const int32_t* sum = nullptr;
  DotProduct dot = nullptr;  // multiplies with the panels, if they hold groups
};

template <class Cell, class Format>
struct PackedLayout {
  using weight_t = typename Format::weight_t;
  static constexpr bool kScales = std::is_same_v<Format, Int8>;

  // Offsets in bytes, each a multiple of 64.
  struct Part {
    int64_t elements = 0, panels = 0, scale = 0, sum = 0;
  };
  Panels<typename Format::acc_t> gates, outputs;
  Part ih, hh, hr;
  int64_t bytes = 0;

  RNNFAST_HD PackedLayout(int64_t input_size, int64_t hidden_size, int64_t output_size,
                          bool projection)
      : gates{hidden_size, Cell::kGates}, outputs{output_size, 1} {
    place(ih, gates.padded(), input_size);
    if (Cell::kRecurrence == Recurrence::kDense) place(hh, gates.padded(), output_size);
    if (projection) place(hr, outputs.padded(), hidden_size);
  }

  PackedMatrix<Format> matrix(const char* base, const Part& part) const {
    PackedMatrix<Format> m;
    m.panels = reinterpret_cast<const weight_t*>(base + part.panels);
    if (kScales) {
      m.scale = reinterpret_cast<const float*>(base + part.scale);
      m.sum = reinterpret_cast<const int32_t*>(base + part.sum);
    }
    return m;
  }

 private:
  RNNFAST_HD int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += divide_up(size, 64) * 64;
    return at;
  }
  RNNFAST_HD void place(Part& part, int64_t columns, int64_t k_size) {
    part.elements = columns * padded_k<Format>(k_size);
    part.panels = take(part.elements * static_cast<int64_t>(sizeof(weight_t)));
    if (kScales) part.scale = take(columns * 4);
    if (kScales) part.sum = take(columns * 4);
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
