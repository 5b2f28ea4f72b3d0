// The pointwise half of a forward step: everything between two products, one thread a hidden unit.
//
// A dense recurrence takes one step a launch, since its product comes in between; any other has no
// product and takes all steps with the same rows in one launch, its state in registers.
#pragma once

#include <type_traits>

#include "../cells/stages.h"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Pointers are those of the first step; each has the distance to the next one, which is negative
// where time runs down.
template <class scalar_t>
struct ForwardSteps {
  using acc_t = accumulator_of<scalar_t>;
  CellOptions options;
  int64_t hidden, rows, steps;
  int64_t carried;      // rows [0, carried) go on from the step before, the others enter here
  int64_t ends_from;    // rows [ends_from, rows) have no step after these
  int64_t row_step;     // rows from one step to the next
  int64_t carry_plane;  // B * H
  const acc_t* gx;      // (rows, G*H)
  const acc_t* gh;      // (rows, G*H) of the product, of rows that have one; of free gates only
  int64_t products;     // rows [0, products) have one; of the others it is zero
  const scalar_t* u;    // (H) of a diagonal recurrence
  const scalar_t *b_ih, *b_hh;  // b_hh: then a cell's parameters
  const scalar_t *h0, *c0;      // (B, H), (S-1, B, H); null: zeros
  const scalar_t* h_before;     // (carried, H) of the step before
  const uint8_t* reset;         // (rows)
  const uint8_t* zone;          // (rows, S, H) and what stays elsewhere, as core/args.h has them
  acc_t keep[2];
  acc_t* carry;             // (S-1, B, H), then h in full precision where it is kept
  scalar_t *y, *h_n, *c_n;  // y: (rows, H), or (rows, H) of h before the projection
  acc_t* saved;             // (rows, planes, H), or null
  int64_t planes;
  bool projected;  // y holds h before the projection, and saved has it, too
};

// What a thread has in registers: one unit of one row.
template <class Cell, class scalar_t>
struct ForwardUnit {
  using acc_t = accumulator_of<scalar_t>;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  static constexpr int F = kFreeGatesOf<Cell>;  // that are multiplied with h
  static constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  static constexpr bool kDiagonal = Cell::kRecurrence == Recurrence::kDiagonal;
  // y rounds h, which is then carried beside it where the next state needs it.
  static constexpr bool kWideH = !std::is_same_v<acc_t, scalar_t> && (kDiagonal || Cell::kReadsH);

  const ForwardSteps<scalar_t>& p;
  int64_t row, unit;
  acc_t b_ih[G], b_hh[G], p_hh[at_least_one<kParametersOf<Cell>>] = {}, u, state[S];

  __device__ ForwardUnit(const ForwardSteps<scalar_t>& steps, int64_t column)
      : p(steps), row(0), unit(column), u(kDiagonal ? widen(p.u[unit]) : acc_t{}) {
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) {
      b_ih[g] = p.b_ih ? widen(p.b_ih[g * p.hidden + unit]) : acc_t{};
      b_hh[g] = p.b_hh ? widen(p.b_hh[g * p.hidden + unit]) : acc_t{};
    }
    RNNFAST_UNROLL
    for (int k = 0; k < kParametersOf<Cell>; ++k)
      if (p.b_hh) p_hh[k] = widen(p.b_hh[(G + k) * p.hidden + unit]);
  }

  __device__ void load_gx(int64_t step, acc_t (&gx)[G]) const {
    const acc_t* from = p.gx + (step * p.row_step + row) * G * p.hidden + unit;
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) gx[g] = from[g * p.hidden] + b_ih[g];
  }

  // The state that enters: of the step before, or the initial one.
  __device__ void load_state() {
    const int64_t at = row * p.hidden + unit;
    const bool carried = row < p.carried;
    state[0] = acc_t{};
    if (kDiagonal || Cell::kReadsH) {
      const scalar_t* from = carried ? p.h_before : p.h0;
      if (kWideH && carried)
        state[0] = p.carry[(S - 1) * p.carry_plane + at];
      else if (from)
        state[0] = widen(from[at]);
    }
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) {
      const int64_t plane = (s - 1) * p.carry_plane;
      state[s] = carried ? p.carry[plane + at] : p.c0 ? widen(p.c0[plane + at]) : acc_t{};
    }
  }

  // The state that enters row `at`, and whether that starts anew: with zeros, and so for its
  // product.
  __device__ bool enter(int64_t at) {
    const bool anew = p.reset && p.reset[at];
    if (anew) {
      RNNFAST_UNROLL
      for (int s = 0; s < S; ++s) state[s] = acc_t{};
    }
    return anew;
  }

  // The hidden side of the gates; of linked ones the bias.
  __device__ void load_gh(bool anew, acc_t (&gh)[G]) const {
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) {
      if constexpr (kDiagonal)
        gh[g] = u * state[0] + b_hh[g];
      else if constexpr (!kDense)
        gh[g] = b_hh[g];
      else
        gh[g] = g < F && row < p.products && !anew ? p.gh[(row * F + g) * p.hidden + unit] + b_hh[g]
                                                   : b_hh[g];
    }
  }

  // y, and what backward wants.
  __device__ void keep(int64_t at, const acc_t (&saved)[at_least_one<K>]) const {
    const int64_t H = p.hidden;
    narrow(state[0], p.y[at * H + unit]);
    if (!p.saved) return;
    acc_t* to = p.saved + at * p.planes * H + unit;
    RNNFAST_UNROLL
    for (int j = 0; j < K; ++j) to[j * H] = saved[j];
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) to[(K + s - 1) * H] = state[s];
    if (p.projected) to[(K + S - 1) * H] = state[0];
  }

  __device__ void take(int64_t step, const acc_t (&gx)[G]) {
    const int64_t at = step * p.row_step + row;
    acc_t gh[G], saved[at_least_one<K>] = {};
    load_gh(enter(at), gh);
    if constexpr (kKeepsOf<Cell>) {
      acc_t stays[S];
      RNNFAST_UNROLL
      for (int s = 0; s < S; ++s) {
        const bool all = p.zone && p.zone[(at * S + s) * p.hidden + unit];
        stays[s] = all ? acc_t(1) : p.keep[s == 0 ? 0 : 1];
      }
      make_cell<Cell>(p.options).forward(stays, gx, gh, state, saved);
    } else {
      cell_forward(make_cell<Cell>(p.options), p_hh, gx, gh, state, saved);
    }
    keep(at, saved);
  }

  // The state that leaves: to the next step, or out.
  __device__ void store_state() const {
    const int64_t at = row * p.hidden + unit;
    const bool ends = row >= p.ends_from;
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) {
      const int64_t plane = (s - 1) * p.carry_plane;
      if (ends)
        narrow(state[s], p.c_n[plane + at]);
      else
        p.carry[plane + at] = state[s];
    }
    if (ends) {
      if (p.h_n) narrow(state[0], p.h_n[at]);
    } else if (kWideH) {
      p.carry[(S - 1) * p.carry_plane + at] = state[0];
    }
  }
};

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    forward_steps(const ForwardSteps<scalar_t> p) {
  using Unit = ForwardUnit<Cell, scalar_t>;
  using acc_t = accumulator_of<scalar_t>;
  // Steps without a product whose gx is asked for at the same time: the loads do not depend
  // on each other, the steps do.
  constexpr int kAhead = Unit::kDense ? 1 : Unit::G > 2 ? 2 : 4;  // as registers allow
  const int64_t column = first_column();
  // Everything that this kernel reads is written before it, the product by the launch just before.
  wait_for_launch_before();
  if (column >= p.hidden) return;
  Unit unit(p, column);
  for (unit.row = first_row(); unit.row < p.rows; unit.row += row_stride()) {
    unit.load_state();
    int64_t step = 0;
    if constexpr (kAhead > 1) {
      for (; step + kAhead <= p.steps; step += kAhead) {
        acc_t gx[kAhead][Unit::G];
        RNNFAST_UNROLL
        for (int k = 0; k < kAhead; ++k) unit.load_gx(step + k, gx[k]);
        RNNFAST_UNROLL
        for (int k = 0; k < kAhead; ++k) unit.take(step + k, gx[k]);
      }
    }
    for (; step < p.steps; ++step) {
      acc_t gx[Unit::G];
      unit.load_gx(step, gx);
      unit.take(step, gx);
    }
    unit.store_state();
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
