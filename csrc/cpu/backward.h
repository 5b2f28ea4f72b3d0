// Backward of one direction of one layer on the CPU: the time loop.
// Gradients: dgx, dgh = dL/d(pre-activations), (N, G*H) in PyTorch's gate
// order; dh, dc = what flows from step to step. Weight and input gradients:
// gradients.h, a chunk at a time, so that dgx and dgh never leave the cache.
//
// A step, for own rows and units: the cell's backward from the carried dh + dy; then, once all of
// dgh is there (a barrier when units are divided), dh of the step before = dgh . w_hh. With a
// projection two products stand in for one: dm = dh . w_hr before the cell, and dh = dgh . w_hh
// after the cell.
#pragma once

#include <type_traits>

#include "backward_base.h"
#include "units.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
class BackwardPass : public BackwardBase<scalar_t> {
  using Base = BackwardBase<scalar_t>;

 public:
  BackwardPass(const BackwardArgs<scalar_t>& args, const Choice& choice,
               const BackwardScratch<scalar_t>& scratch, const Worker& worker)
      : Base(kShape, args, choice, scratch, worker) {}

  // Step t; its gate gradients go to the chunk's rows, which begin with row `base` of the layer.
  // `carry`: whether dh of the step before is wanted. Ends with a barrier, so that all workers may
  // read the step's dgx and dgh.
  void step(int64_t t, int64_t base, bool carry) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    const int64_t row = first_row(args_, t) - base + mine_.rows.begin;  // of the chunk
    if (args_.w_hr) {
      if (count > 0) this->take_output_gradient(t, row, count);
      this->barrier_if_shared();
      if (count > 0) this->undo_projection(row, count);
    }
    for (int64_t r = 0; r < count; ++r) cell_row(t, mine_.rows.begin + r, row + r);
    if (Cell::kRecurrence == Recurrence::kDense) this->barrier_if_shared();
    if (Cell::kRecurrence == Recurrence::kDense && carry && count > 0) this->carry_back(row, count);
    if (args_.reset) this->cut_gradients(t);
  }

 protected:
  static constexpr CellShape kShape = shape_of<Cell>();
  using Base::args_, Base::s_, Base::units_, Base::mine_, Base::planes_, Base::kLanes;
  using typename Base::V;

  // The cell's backward for one row and the own units, in
  // order: what forward kept is read as a few streams.
  void cell_row(int64_t t, int64_t b, int64_t chunk_row) {
    const int64_t layer_row = first_row(args_, t) + b;
    const scalar_t* dy = args_.dy.data && !args_.w_hr
                             ? step_of(args_, args_.dy, t) + b * args_.dy.row_stride
                             : nullptr;
    const scalar_t* before[Cell::kStates];
    for (int k = 0; k < Cell::kStates; ++k) before[k] = this->state_before(k, t, b);
    const Range units = columns_of(units_, mine_.panels);
    const auto ahead = this->row_ahead(t, b);
    for (int64_t unit = units.begin; unit < units.end;) {
      const int64_t left = args_.hidden_size - unit;
      if (ahead.saved) ahead.fetch(unit, planes_, args_.hidden_size);
      if (unit + kLanes < units.end && left >= 2 * kLanes) {
        if (ahead.saved) ahead.fetch(unit + kLanes, planes_, args_.hidden_size);
        cell_vector<pair_of<scalar_t>>(unit, 2 * kLanes, layer_row, b, chunk_row, dy, before);
        unit += 2 * kLanes;
        continue;
      }
      cell_vector<V>(unit, left, layer_row, b, chunk_row, dy, before);
      unit += kLanes;
    }
  }

  // W: a vector, of which the layer has `left` lanes, or a whole pair.
  template <class W>
  RNNFAST_HD void cell_vector(int64_t unit, int64_t left, int64_t layer_row, int64_t b,
                              int64_t chunk_row, const scalar_t* dy,
                              const scalar_t* const (&before)[Cell::kStates]) {
    W kept[at_least_one<Cell::kSaved>], prev[Cell::kStates], next[Cell::kStates],
        dstate[Cell::kStates];
    W dgx[Cell::kGates], dgh[Cell::kGates];
    RNNFAST_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k)
      kept[k] = load_units<W>(this->saved_plane(layer_row, k) + unit, left);
    prev[0] = next[0] = W{};
    RNNFAST_UNROLL
    for (int k = args_.w_hr ? 1 : 0; k < Cell::kStates; ++k) {
      prev[k] = before[k] ? load_units<W>(before[k] + unit, left) : W{};
      next[k] = load_units<W>(k == 0 ? args_.y + layer_row * args_.output_size + unit
                                     : this->saved_plane(layer_row, Cell::kSaved + k - 1) + unit,
                              left);
    }
    if (args_.w_hr) {
      // prev[0] is of another size; a cell with a projection does not look at it.
      next[0] = load_units<W>(this->hidden_of(layer_row) + unit, left);
      dstate[0] = load_units<W>(s_.dm + b * units_.padded() + unit, left);
    } else {
      dstate[0] = load_units<W>(s_.dh + b * args_.output_size + unit, left);
      if (dy) dstate[0] += load_units<W>(dy + unit, left);
    }
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      dstate[k] = load_units<W>(this->inner_gradient(k, b) + unit, left);

    constexpr int kParameters = kParametersOf<Cell>;
    W params[at_least_one<kParameters>] = {}, dparams[at_least_one<kParameters>] = {};
    RNNFAST_UNROLL
    for (int k = 0; k < kParameters; ++k)
      if (args_.b_hh)
        params[k] = load_units<W>(args_.b_hh + (Cell::kGates + k) * args_.hidden_size + unit, left);

    if constexpr (kKeepsOf<Cell>) {
      W keep[Cell::kStates];
      RNNFAST_UNROLL
      for (int s = 0; s < Cell::kStates; ++s) {
        constexpr int kSide = sizeof(W) / sizeof(V);
        V part[kSide];
        RNNFAST_UNROLL
        for (int i = 0; i < kSide; ++i)
          part[i] = kept_part<scalar_t>(args_, Cell::kStates, layer_row, s, unit + i * kLanes,
                                        left - i * kLanes);
        __builtin_memcpy(&keep[s], part, sizeof(part));
      }
      cell_.backward(keep, kept, prev, next, dstate, dgx, dgh);
    } else {
      cell_backward(cell_, params, dparams, kept, prev, next, dstate, dgx, dgh);
    }

    RNNFAST_UNROLL
    for (int k = 0; k < kParameters; ++k)
      store_units(s_.dp + chunk_row * s_.parameter_row + k * args_.hidden_size + unit, dparams[k],
                  left);

    RNNFAST_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      const int64_t at = chunk_row * s_.gate_row + g * args_.hidden_size + unit;
      store_units(s_.dgx + at, dgx[g], left);
      if (Cell::kSplitGates) store_units(s_.dgh + at, dgh[g], left);
    }
    if constexpr (Cell::kRecurrence == Recurrence::kDiagonal)
      dstate[0] += dgh[0] * load_units<W>(args_.w_hh + unit, left);
    if (!args_.w_hr) store_units(s_.dh + b * args_.output_size + unit, dstate[0], left);
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      store_units(this->inner_gradient(k, b) + unit, dstate[k], left);
  }

  const Cell cell_ = make_cell<Cell>(args_.options);
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
