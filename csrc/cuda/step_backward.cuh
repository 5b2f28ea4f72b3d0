// The pointwise half of a backward step: what arrives at h and c, through the cell, to the
// gradients of the gates. As forward, a recurrence without a product takes many steps in
// one launch.
#pragma once

#include "../cells/stages.h"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// "Before" and "after" are those of the forward pass, so that this pass comes from the step after.
// Pointers are those of the first step that is taken (the last of forward); each has the distance
// to the next one taken.
template <class scalar_t>
struct BackwardSteps {
  using acc_t = accumulator_of<scalar_t>;
  CellOptions options;
  int64_t hidden, rows, steps;
  int64_t goes_on;  // rows [0, goes_on) have a step after these: their gradient is in the carry
  int64_t carried;  // rows [0, carried) have a step before the last one taken; the others entered
  int64_t row_step;
  int64_t carry_plane;      // B * H
  Rows<const scalar_t> dy;  // null data: none came
  const acc_t* dh_whole;    // (rows, H): all of dL/dh, with a projection; null: dy and the carry
  const scalar_t *dh_n, *dc_n;
  const uint8_t *reset, *reset_after;  // of these rows, and of the step after; null: none
  const uint8_t* zone;                 // (rows, S, H) and what stays elsewhere, as in core/args.h
  acc_t keep[2];
  acc_t *dh, *dc;            // the carry: (B, H), (S-1, B, H)
  const scalar_t* y;         // (rows, H), null with a projection
  const acc_t* saved;        // (rows, planes, H)
  const scalar_t* y_before;  // the same of the step before the last one taken
  const acc_t* saved_before;
  int64_t planes;
  const scalar_t *h0, *c0;
  const scalar_t* u;
  const scalar_t* parameters;  // (parameters, H), or null
  scalar_t* dp;                // (rows, parameters*H), of a cell with parameters
  scalar_t *dgx, *dgh;         // (rows, G*H); the same where the cell keeps one
  // (rows, H) of h as it entered, where the weights' gradients can't take it from y; or null.
  scalar_t* h_entered;
};

// What a thread has in registers: one unit of one row.
template <class Cell, class scalar_t>
struct BackwardUnit {
  using acc_t = accumulator_of<scalar_t>;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;

  const BackwardSteps<scalar_t>& p;
  int64_t row, unit;
  acc_t dstate[S], saved[at_least_one<K>], prev[S], next[S];

  __device__ BackwardUnit(const BackwardSteps<scalar_t>& steps, int64_t column)
      : p(steps), row(0), unit(column) {}

  // What comes from the step after; a row that started anew there sends nothing back.
  __device__ void load_gradients() {
    const int64_t H = p.hidden;
    const bool goes_on = row < p.goes_on;
    const bool cut = goes_on && p.reset_after && p.reset_after[row];
    dstate[0] = acc_t{};
    if (p.dh_whole) {
      dstate[0] = p.dh_whole[row * H + unit];
    } else if (goes_on) {
      if (!cut) dstate[0] = p.dh[row * H + unit];
    } else if (p.dh_n) {
      dstate[0] = widen(p.dh_n[row * H + unit]);
    }
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) {
      const int64_t at = (s - 1) * p.carry_plane + row * H + unit;
      dstate[s] = acc_t{};
      if (goes_on) {
        if (!cut) dstate[s] = p.dc[at];
      } else if (p.dc_n) {
        dstate[s] = widen(p.dc_n[at]);
      }
    }
  }
  __device__ void add_dy(int64_t step) {
    if (p.dy.data)
      dstate[0] += widen(p.dy.data[step * p.dy.step_stride + row * p.dy.row_stride + unit]);
  }

  // What forward kept, and the states before and after the step; whether the row starts anew.
  __device__ bool load_states(int64_t step) {
    const int64_t at = step * p.row_step + row, H = p.hidden;
    const bool anew = p.reset && p.reset[at];
    const acc_t* kept = p.saved + at * p.planes * H + unit;
    RNNFAST_UNROLL
    for (int j = 0; j < K; ++j) saved[j] = kept[j * H];
    prev[0] = next[0] = acc_t{};
    if (p.y) next[0] = widen(p.y[at * H + unit]);
    if (!anew && (Cell::kReadsH || p.h_entered)) {
      if (step + 1 < p.steps)
        prev[0] = widen(p.y[(at + p.row_step) * H + unit]);
      else if (row < p.carried)
        prev[0] = widen(p.y_before[row * H + unit]);
      else if (p.h0)
        prev[0] = widen(p.h0[row * H + unit]);
    }
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) {
      next[s] = kept[(K + s - 1) * H];
      prev[s] = acc_t{};
      if (anew) continue;
      if (step + 1 < p.steps)
        prev[s] = kept[(p.row_step * p.planes + K + s - 1) * H];
      else if (row < p.carried)
        prev[s] = p.saved_before[(row * p.planes + K + s - 1) * H + unit];
      else if (p.c0)
        prev[s] = widen(p.c0[(s - 1) * p.carry_plane + row * H + unit]);
    }
    return anew;
  }

  // To the step before, but for the way through a product, which adds to dh.
  __device__ void store_gradients() const {
    if (Cell::kRecurrence != Recurrence::kDense || Cell::kReadsH)
      p.dh[row * p.hidden + unit] = dstate[0];
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) p.dc[(s - 1) * p.carry_plane + row * p.hidden + unit] = dstate[s];
  }
};

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    backward_steps(const BackwardSteps<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  constexpr bool kDiagonal = Cell::kRecurrence == Recurrence::kDiagonal;
  const int64_t H = p.hidden;
  BackwardUnit<Cell, scalar_t> unit(p, first_column());
  wait_for_launch_before();
  if (unit.unit >= H) return;
  const acc_t u = kDiagonal ? widen(p.u[unit.unit]) : acc_t{};
  constexpr int kParameters = kParametersOf<Cell>;
  acc_t params[at_least_one<kParameters>] = {};
  RNNFAST_UNROLL
  for (int k = 0; k < kParameters; ++k)
    if (p.parameters) params[k] = widen(p.parameters[k * H + unit.unit]);

  for (unit.row = first_row(); unit.row < p.rows; unit.row += row_stride()) {
    unit.load_gradients();
    for (int64_t step = 0; step < p.steps; ++step) {
      const int64_t at = step * p.row_step + unit.row;
      unit.add_dy(step);
      const bool anew = unit.load_states(step);
      acc_t dgx[G], dgh[G], dparams[at_least_one<kParameters>] = {};
      if constexpr (kKeepsOf<Cell>) {
        acc_t keep[S];
        RNNFAST_UNROLL
        for (int s = 0; s < S; ++s)
          keep[s] =
              p.zone && p.zone[(at * S + s) * H + unit.unit] ? acc_t(1) : p.keep[s == 0 ? 0 : 1];
        make_cell<Cell>(p.options).backward(keep, unit.saved, unit.prev, unit.next, unit.dstate,
                                            dgx, dgh);
      } else {
        cell_backward(make_cell<Cell>(p.options), params, dparams, unit.saved, unit.prev, unit.next,
                      unit.dstate, dgx, dgh);
      }
      RNNFAST_UNROLL
      for (int k = 0; k < kParameters; ++k)
        narrow(dparams[k], p.dp[(at * kParameters + k) * H + unit.unit]);

      scalar_t* const to_gx = p.dgx + at * G * H + unit.unit;
      RNNFAST_UNROLL
      for (int g = 0; g < G; ++g) narrow(dgx[g], to_gx[g * H]);
      if constexpr (Cell::kSplitGates) {
        scalar_t* const to_gh = p.dgh + at * G * H + unit.unit;
        RNNFAST_UNROLL
        for (int g = 0; g < G; ++g) narrow(dgh[g], to_gh[g * H]);
      }
      if (p.h_entered) narrow(unit.prev[0], p.h_entered[at * H + unit.unit]);
      if constexpr (kDiagonal) unit.dstate[0] += u * dgh[0];
      if constexpr (!kDense) {
        if (!anew || step + 1 == p.steps) continue;
        RNNFAST_UNROLL
        for (int s = 0; s < S; ++s) unit.dstate[s] = acc_t{};
      }
    }
    unit.store_gradients();
  }
}

// With a projection: dL/dy of all that arrives at y, for the product with w_hr; and y as it
// entered.
template <class scalar_t>
struct ProjectedStep {
  using acc_t = accumulator_of<scalar_t>;
  int64_t outputs, rows, goes_on, carried;
  Rows<const scalar_t> dy;
  const scalar_t* dh_n;
  const uint8_t *reset, *reset_after;
  const acc_t* dh;  // the carry, (B, P)
  const scalar_t *y_before, *h0;
  scalar_t* dm;         // (rows, P)
  scalar_t* h_entered;  // (rows, P), or null
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    gather_projected(const ProjectedStep<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t column = first_column(), P = p.outputs;
  wait_for_launch_before();
  if (column >= P) return;
  for (int64_t row = first_row(); row < p.rows; row += row_stride()) {
    const int64_t at = row * P + column;
    acc_t sum{};
    if (row < p.goes_on) {
      if (!(p.reset_after && p.reset_after[row])) sum = p.dh[at];
    } else if (p.dh_n) {
      sum = widen(p.dh_n[at]);
    }
    if (p.dy.data) sum += widen(p.dy.data[row * p.dy.row_stride + column]);
    narrow(sum, p.dm[at]);
    if (!p.h_entered) continue;
    scalar_t entered{};
    if (!(p.reset && p.reset[row])) {
      if (row < p.carried)
        entered = p.y_before[at];
      else if (p.h0)
        entered = p.h0[at];
    }
    p.h_entered[at] = entered;
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
