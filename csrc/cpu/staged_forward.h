// A step of a cell with stages (cells/stages.h): first all gates of a worker's rows, then the
// halves of the cell with what stands between them. Rows are whole, gate by gate, and belong to one
// worker each: there is no barrier in a step.
#pragma once

#include "forward_scratch.h"
#include "norm.h"
#include "units.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class Format>
class StagedForward {
 public:
  using scalar_t = typename Format::tensor_t;
  static_assert(std::is_same_v<Format, Plain<scalar_t>> &&
                    std::is_same_v<scalar_t, typename Format::acc_t>,
                "cells with stages are computed in full width");

  StagedForward(const ForwardArgs<scalar_t>& args, const ForwardScratch<Format>& scratch)
      : args_(args),
        s_(scratch),
        free_(gate_panels<scalar_t>(kShape, args.hidden_size, kShape.free_gates)),
        linked_(gate_panels<scalar_t>(kShape, args.hidden_size, kShape.linked_gates)) {}

  // A share of the panels of w_hh; those of w_ih and the biases are packed as always.
  void pack(const Worker& worker) const {
    if constexpr (kDense) pack_part(worker, free_, args_.w_hh, s_.w_hh_out);
    if constexpr (kLinked) pack_part(worker, linked_, linked_weights(), s_.w_link_out);
  }

  // The input side of step t of the rows of the batch in `rows`, in place.
  void norm_inputs(int64_t t, Range rows, scalar_t* gx) const {
    for (int64_t b = rows.begin; b < rows.end; ++b, gx += s_.gx_row)
      norm_gates(first_row(args_, t) + b, 0, args_.b_ih, gx);
  }

  // Step t of the rows of the batch in `rows`; gx: of the first of them. `back`: panels from the
  // last to the first, which a cache may still have.
  void step(int64_t t, Range rows, const scalar_t* gx, const scalar_t* h, scalar_t* h_next,
            bool back) const {
    const int64_t size = args_.hidden_size;
    // What is normalised has its bias added behind that.
    const scalar_t* bias = args_.b_hh && !kNormsGates<Cell> ? s_.b_hh : nullptr;
    scalar_t* gh = s_.gh + rows.begin * s_.gx_row;
    if constexpr (kDense)
      product(free_, rows.size(), h + rows.begin * s_.h_row, s_.w_hh, args_.w_hh, bias, gh, back);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const scalar_t* gx_row = gx + (b - rows.begin) * s_.gx_row;
      if constexpr (kNormsHidden<Cell>)
        norm_gates(first_row(args_, t) + b, 1, args_.b_hh, s_.gh + b * s_.gx_row);
      if constexpr (kLinkOf<Cell> != Link::kNone) begin_row(b, gx_row, h + b * s_.h_row);
      if constexpr (kLinkOf<Cell> == Link::kNorm) {
        scalar_t* link = s_.link + b * s_.h_row;
        normalise(link, size, norm_parameter(kNormPlanes<Cell>),
                  norm_parameter(kNormPlanes<Cell> + 1), link);
      }
      if constexpr (!kLinked) finish_row(t, b, gx_row, h + b * s_.h_row, h_next + b * s_.h_row);
    }
    if constexpr (kLinked) {
      product(linked_, rows.size(), s_.link + rows.begin * s_.h_row, s_.w_link, linked_weights(),
              bias ? bias + free_.units : nullptr, gh + kFreeGatesOf<Cell> * size, back);
      for (int64_t b = rows.begin; b < rows.end; ++b)
        finish_row(t, b, gx + (b - rows.begin) * s_.gx_row, h + b * s_.h_row,
                   h_next + b * s_.h_row);
    }
  }

 private:
  static constexpr int64_t kLanes = lanes_of<scalar_t>;
  static constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  static constexpr CellShape kShape = shape_of<Cell>();
  static constexpr bool kLinked = kLinkOf<Cell> == Link::kProduct;

  // The k-th of those behind the bias, each of a number a unit; null: there are none.
  const scalar_t* norm_parameter(int k) const {
    return args_.b_hh ? args_.b_hh + (Cell::kGates + k) * args_.hidden_size : nullptr;
  }

  // A side of the gates (0: of the input) of a row of the layer, in place; as it was, it is kept.
  void norm_gates(int64_t row, int side, const scalar_t* bias, scalar_t* gates) const {
    const int64_t size = args_.hidden_size;
    if (args_.saved)
      __builtin_memcpy(args_.saved + (row * kShape.planes + kShape.planes - kNormPlanes<Cell> +
                                      side * Cell::kGates) *
                                         size,
                       gates, Cell::kGates * size * sizeof(scalar_t));
    const scalar_t* gain = norm_parameter(side * Cell::kGates);
    for_norm_groups<Cell>(size, [&](int64_t begin, int64_t count) {
      normalise(gates + begin, count, gain ? gain + begin : nullptr, bias ? bias + begin : nullptr,
                gates + begin);
    });
  }

  const scalar_t* linked_weights() const { return args_.w_hh + free_.units * args_.output_size; }

  void pack_part(const Worker& worker, const Panels<scalar_t>& panels, const scalar_t* from,
                 scalar_t* to) const {
    const Range mine = part_of(panels.count(), worker.index, worker.count);
    for (int64_t p = mine.begin; p < mine.end && to; ++p)
      pack_units(panels, p, args_.output_size, from, to);
  }

  // out = a . w^T + bias, by whichever kernel has the weights.
  void product(const Panels<scalar_t>& panels, int64_t rows, const scalar_t* a,
               const PackedMatrix<Format>& packed, const scalar_t* plain, const scalar_t* bias,
               scalar_t* out, bool back) const {
    const int64_t k_size = args_.output_size;
    if (!packed.panels)
      return multiply_direct(rows, panels.units, k_size, a, s_.h_row, plain, k_size, bias, out,
                             s_.gx_row);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t p = back ? panels.count() - 1 - i : i, at = panels.offset(p);
      multiply(
          rows, panels.vectors(p),
          Operands<scalar_t>{k_size, a, s_.h_row, 1, packed_panel(panels, p, k_size, packed.panels),
                             bias ? bias + at : nullptr, 0, out + at, s_.gx_row});
    }
  }

  // The gates of a unit, or of several.
  template <class W>
  RNNFAST_HD void load_gates(const scalar_t* row, int64_t unit, W (&gates)[Cell::kGates]) const {
    RNNFAST_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      gates[g] = load_whole<W>(row + g * args_.hidden_size + unit);
  }
  template <class W>
  RNNFAST_HD void load_states(const scalar_t* h, int64_t b, int64_t unit, int64_t left,
                              W (&state)[Cell::kStates]) const {
    state[0] = load_whole<W>(h + unit);
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      state[k] = load_units<W>(inner_state(k, b) + unit, left);
  }

  void begin_row(int64_t b, const scalar_t* gx, const scalar_t* h) const {
    scalar_t *gh = s_.gh + b * s_.gx_row, *to = s_.link + b * s_.h_row;
    for_units<scalar_t>(args_.hidden_size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      W gates_x[Cell::kGates], gates_h[Cell::kGates], state[Cell::kStates], link;
      load_gates(gx, unit, gates_x);
      load_gates(gh, unit, gates_h);
      load_states(h, b, unit, left, state);
      cell_.begin(gates_x, gates_h, state, link);
      RNNFAST_UNROLL
      for (int g = 0; g < Cell::kGates; ++g)
        store_units(gh + g * args_.hidden_size + unit, gates_h[g], left);
      RNNFAST_UNROLL
      for (int k = 1; k < Cell::kStates; ++k) store_units(inner_state(k, b) + unit, state[k], left);
      store_whole(to + unit, link);
    });
  }

  void finish_row(int64_t t, int64_t b, const scalar_t* gx, const scalar_t* h,
                  scalar_t* h_next) const {
    const int64_t size = args_.hidden_size, row = first_row(args_, t) + b;
    const scalar_t *gh = s_.gh + b * s_.gx_row, *link = s_.link + b * s_.h_row;
    scalar_t* y = args_.y ? args_.y + row * size : nullptr;
    scalar_t* h_n = is_last(args_, t, b) ? args_.h_n + b * size : nullptr;
    scalar_t* saved = args_.saved ? args_.saved + row * kShape.planes * size : nullptr;
    for_units<scalar_t>(size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      W gates_x[Cell::kGates], gates_h[Cell::kGates], state[Cell::kStates];
      W kept[at_least_one<Cell::kSaved>];
      load_gates(gx, unit, gates_x);
      load_states(h, b, unit, left, state);
      if constexpr (kDense) {
        load_gates(gh, unit, gates_h);
      } else {
        gates_h[0] = load_units<W>(args_.w_hh + unit, left) * state[0];
        if (args_.b_hh) gates_h[0] += load_units<W>(args_.b_hh + unit, left);
      }
      if constexpr (kLinkOf<Cell> == Link::kNone)
        cell_.forward(gates_x, gates_h, state, kept);
      else
        cell_.finish(gates_x, gates_h, load_whole<W>(link + unit), state, kept);
      store_whole(h_next + unit, state[0]);
      if (y) store_units(y + unit, state[0], left);
      if (h_n) store_units(h_n + unit, state[0], left);
      if (!saved) return;
      RNNFAST_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) store_units(saved + k * size + unit, kept[k], left);
      RNNFAST_UNROLL
      for (int k = 1; k < Cell::kStates; ++k)
        store_units(saved + (Cell::kSaved + k - 1) * size + unit, state[k], left);
    });
  }

  scalar_t* inner_state(int k, int64_t b) const {
    return s_.c + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  const ForwardArgs<scalar_t>& args_;
  const ForwardScratch<Format>& s_;
  const Panels<scalar_t> free_, linked_;  // of w_hh
  const Cell cell_ = make_cell<Cell>(args_.options);
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
