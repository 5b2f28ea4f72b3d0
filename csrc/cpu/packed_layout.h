// Where the packed weights of a layer lie in one buffer: panels of w_ih, w_hh and w_hr, then, for
// bytes, their scales and sums.
#pragma once

#include "../cells/shape.h"
#include "formats.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The gates of a unit side by side; of a cell with stages, which needs whole rows of them, gate by
// gate as PyTorch has them.
template <class acc_t>
Panels<acc_t> gate_panels(const CellShape& cell, int64_t hidden_size, int gates) {
  if (cell.stages) return {gates * hidden_size, 1};
  return {hidden_size, gates};
}

template <class Format>
struct PackedMatrix {
  const typename Format::weight_t* panels = nullptr;
  const float* scale = nullptr;
  const int32_t* sum = nullptr;
  DotProduct dot = nullptr;  // multiplies with the panels, if they hold groups
};

template <class Format>
struct PackedLayout {
  using weight_t = typename Format::weight_t;
  using acc_t = typename Format::acc_t;
  static constexpr bool kScales = std::is_same_v<Format, Int8>;

  // Offsets in bytes, each a multiple of 64.
  struct Part {
    int64_t elements = 0, panels = 0, scale = 0, sum = 0;
  };
  Panels<acc_t> gates, outputs;
  Panels<acc_t> free_gates, linked_gates;  // of w_hh: cells/stages.h
  Part ih, hh, hr, link;
  int64_t bytes = 0;

  PackedLayout(const CellShape& cell, int64_t input_size, int64_t hidden_size, int64_t output_size,
               bool projection)
      : gates(gate_panels<acc_t>(cell, hidden_size, cell.gates)),
        outputs{output_size, 1},
        free_gates(gate_panels<acc_t>(cell, hidden_size, cell.free_gates)),
        linked_gates(gate_panels<acc_t>(cell, hidden_size, cell.linked_gates)) {
    place(ih, gates.padded(), input_size);
    if (cell.recurrence == Recurrence::kDense) place(hh, free_gates.padded(), output_size);
    if (projection) place(hr, outputs.padded(), hidden_size);
    if (cell.linked_gates > 0) place(link, linked_gates.padded(), output_size);
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
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += divide_up(size, 64) * 64;
    return at;
  }
  void place(Part& part, int64_t columns, int64_t k_size) {
    part.elements = columns * padded_k<Format>(k_size);
    part.panels = take(part.elements * static_cast<int64_t>(sizeof(weight_t)));
    if (kScales) part.scale = take(columns * 4);
    if (kScales) part.sum = take(columns * 4);
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
