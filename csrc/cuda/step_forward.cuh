// The pointwise half of a forward step: everything between two products, one thread a hidden unit.
//
// A dense recurrence takes one step a launch, since its product comes in between; a diagonal one
// has no product and takes all steps with the same rows in one launch, its state in registers.
#pragma once

#include "../cells/cell.h"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Pointers are those of the first step; each has the distance to the next one, which is negative
// where time runs down.
template <class scalar_t>
struct ForwardSteps {
  using acc_t = accumulator_of<scalar_t>;
  int64_t hidden, rows, steps;
  int64_t carried;      // rows [0, carried) go on from the step before, the others enter here
  int64_t ends_from;    // rows [ends_from, rows) have no step after these
  int64_t row_step;     // rows from one step to the next
  int64_t carry_plane;  // B * H
  const acc_t* gx;      // (rows, G*H)
  const acc_t* gh;      // (rows, G*H) of the product, of rows that have one
  int64_t products;     // rows [0, products) have one; of the others it is zero
  const scalar_t* u;    // (H) of a diagonal recurrence
  const scalar_t *b_ih, *b_hh;
  const scalar_t *h0, *c0;   // (B, H), (S-1, B, H); null: zeros
  const scalar_t* h_before;  // (carried, H) of the step before
  const uint8_t* reset;      // (rows)
  acc_t* carry;              // (S-1, B, H), then h in full precision where it is kept
  scalar_t *y, *h_n, *c_n;   // y: (rows, H), or (rows, H) of h before the projection
  acc_t* saved;              // (rows, planes, H), or null
  int64_t planes;
  bool wide_h;     // h is carried in full precision, too
  bool projected;  // y holds h before the projection, and saved has it, too
};

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) forward_steps(const ForwardSteps<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  constexpr bool kDiagonal = Cell::kRecurrence == Recurrence::kDiagonal;
  // Steps of a diagonal recurrence whose gx is asked for at the same time: the loads do not depend
  // on each other, the steps do.
  constexpr int kAhead = kDiagonal ? 8 : 1;
  const int64_t unit = first_column();
  const int64_t H = p.hidden;
  // Everything that this kernel reads is written before it, the product by the launch just before.
  wait_for_launch_before();
  if (unit >= H) return;
  acc_t b_ih[G], b_hh[G];
  RNNFAST_UNROLL
  for (int g = 0; g < G; ++g) {
    b_ih[g] = p.b_ih ? widen(p.b_ih[g * H + unit]) : acc_t{};
    b_hh[g] = p.b_hh ? widen(p.b_hh[g * H + unit]) : acc_t{};
  }
  const acc_t u = kDiagonal ? widen(p.u[unit]) : acc_t{};

  for (int64_t row = first_row(); row < p.rows; row += row_stride()) {
    // The state that enters: of the step before, or the initial one.
    const bool carried = row < p.carried;
    acc_t state[S];
    state[0] = acc_t{};
    if (kDiagonal || Cell::kReadsH) {
      if (!carried)
        state[0] = p.h0 ? widen(p.h0[row * H + unit]) : acc_t{};
      else if (p.wide_h)
        state[0] = p.carry[(S - 1) * p.carry_plane + row * H + unit];
      else
        state[0] = widen(p.h_before[row * H + unit]);
    }
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) {
      const int64_t at = (s - 1) * p.carry_plane + row * H + unit;
      state[s] = carried ? p.carry[at] : p.c0 ? widen(p.c0[at]) : acc_t{};
    }

    for (int64_t step = 0; step < p.steps; step += kAhead) {
      const int64_t count = p.steps - step < kAhead ? p.steps - step : kAhead;
      acc_t gx[kAhead][G];
      RNNFAST_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const acc_t* from = p.gx + ((step + k) * p.row_step + row) * G * H + unit;
        RNNFAST_UNROLL
        for (int g = 0; g < G; ++g) gx[k][g] = k < count ? from[g * H] + b_ih[g] : acc_t{};
      }
      RNNFAST_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        if (k >= count) break;
        const int64_t at = (step + k) * p.row_step + row;
        // A row that starts anew has zeros for its state, and so for its product.
        const bool anew = p.reset && p.reset[at];
        if (anew) {
          RNNFAST_UNROLL
          for (int s = 0; s < S; ++s) state[s] = acc_t{};
        }
        acc_t gh[G];
        RNNFAST_UNROLL
        for (int g = 0; g < G; ++g) {
          if constexpr (kDiagonal)
            gh[g] = u * state[0] + b_hh[g];
          else
            gh[g] =
                row < p.products && !anew ? p.gh[row * G * H + g * H + unit] + b_hh[g] : b_hh[g];
        }
        acc_t saved[at_least_one<K>] = {};
        Cell::forward(gx[k], gh, state, saved);

        scalar_t h;
        narrow(state[0], h);
        p.y[at * H + unit] = h;
        if (p.saved) {
          acc_t* to = p.saved + at * p.planes * H + unit;
          RNNFAST_UNROLL
          for (int j = 0; j < K; ++j) to[j * H] = saved[j];
          RNNFAST_UNROLL
          for (int s = 1; s < S; ++s) to[(K + s - 1) * H] = state[s];
          if (p.projected) to[(K + S - 1) * H] = state[0];
        }
      }
    }

    // The state that leaves: to the next step, or out.
    if (row >= p.ends_from) {
      if (p.h_n) narrow(state[0], p.h_n[row * H + unit]);
      RNNFAST_UNROLL
      for (int s = 1; s < S; ++s) narrow(state[s], p.c_n[(s - 1) * p.carry_plane + row * H + unit]);
    } else {
      RNNFAST_UNROLL
      for (int s = 1; s < S; ++s) p.carry[(s - 1) * p.carry_plane + row * H + unit] = state[s];
      if (p.wide_h) p.carry[(S - 1) * p.carry_plane + row * H + unit] = state[0];
    }
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
