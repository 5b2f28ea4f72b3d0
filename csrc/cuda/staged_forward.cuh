// The halves of a forward step of a cell with stages (cells/stages.h), one thread a hidden unit.
#pragma once

#include "step_forward.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct StagedForward {
  using acc_t = accumulator_of<scalar_t>;
  ForwardSteps<scalar_t> step;  // one
  acc_t* left;                  // (rows, F*H) what begin leaves in the free gates
  scalar_t* link;               // (rows, H), of a second product
  acc_t* linked;  // (rows, L*H) of the second product; (rows, H) of a link that is normalised
};

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    begin_forward(const StagedForward<scalar_t> p) {
  using Unit = ForwardUnit<Cell, scalar_t>;
  using acc_t = accumulator_of<scalar_t>;
  const int64_t column = first_column(), H = p.step.hidden;
  wait_for_launch_before();
  if (column >= H) return;
  Unit unit(p.step, column);
  for (unit.row = first_row(); unit.row < p.step.rows; unit.row += row_stride()) {
    acc_t gx[Unit::G], gh[Unit::G], link;
    unit.load_state();
    unit.load_gx(0, gx);
    unit.load_gh(unit.enter(unit.row), gh);
    make_cell<Cell>(p.step.options).begin(gx, gh, unit.state, link);
    RNNFAST_UNROLL
    for (int g = 0; g < Unit::F; ++g) p.left[(unit.row * Unit::F + g) * H + column] = gh[g];
    const int64_t at = unit.row * H + column;
    if constexpr (kLinkOf<Cell> == Link::kProduct)
      narrow(link, p.link[at]);
    else
      p.linked[at] = link;
    RNNFAST_UNROLL
    for (int s = 1; s < Unit::S; ++s)
      p.step.carry[(s - 1) * p.step.carry_plane + at] = unit.state[s];
  }
}

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    finish_forward(const StagedForward<scalar_t> p) {
  using Unit = ForwardUnit<Cell, scalar_t>;
  using acc_t = accumulator_of<scalar_t>;
  constexpr int F = Unit::F, L = kLinkedGatesOf<Cell>;
  const int64_t column = first_column(), H = p.step.hidden;
  wait_for_launch_before();
  if (column >= H) return;
  Unit unit(p.step, column);
  for (unit.row = first_row(); unit.row < p.step.rows; unit.row += row_stride()) {
    acc_t gx[Unit::G], gh[Unit::G], saved[at_least_one<Unit::K>] = {};
    unit.load_state();
    unit.enter(unit.row);
    unit.load_gx(0, gx);
    const int64_t at = unit.row * H + column;
    RNNFAST_UNROLL
    for (int s = 1; s < Unit::S; ++s)
      unit.state[s] = p.step.carry[(s - 1) * p.step.carry_plane + at];
    const acc_t link = kLinkOf<Cell> == Link::kNorm ? p.linked[at] : acc_t{};
    RNNFAST_UNROLL
    for (int g = 0; g < Unit::G; ++g)
      gh[g] = g < F ? p.left[(unit.row * F + g) * H + column]
                    : p.linked[(unit.row * L + g - F) * H + column] + unit.b_hh[g];
    make_cell<Cell>(p.step.options).finish(gx, gh, link, unit.state, saved);
    unit.keep(unit.row, saved);
    unit.store_state();
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
