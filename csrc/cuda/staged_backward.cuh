// The halves of a backward step of a cell with stages (cells/stages.h), the second one first.
#pragma once

#include "step_backward.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct StagedBackward {
  BackwardSteps<scalar_t> step;            // one
  accumulator_of<scalar_t>* dlink;         // (rows, H)
  const accumulator_of<scalar_t>* linked;  // (rows, H) of a link that was normalised
  scalar_t* links;                         // (rows, H) of the links themselves, or null
};

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    finish_backward(const StagedBackward<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  constexpr int G = Cell::kGates;
  const int64_t H = p.step.hidden;
  BackwardUnit<Cell, scalar_t> unit(p.step, first_column());
  wait_for_launch_before();
  if (unit.unit >= H) return;
  for (unit.row = first_row(); unit.row < p.step.rows; unit.row += row_stride()) {
    unit.load_gradients();
    unit.add_dy(0);
    unit.load_states(0);
    const int64_t at = unit.row * H + unit.unit;
    acc_t dgates[G] = {}, dlink{};
    const acc_t link = kLinkOf<Cell> == Link::kNorm ? p.linked[at] : acc_t{};
    make_cell<Cell>(p.step.options)
        .finish_backward(unit.saved, link, unit.prev, unit.next, unit.dstate, dgates, dlink);
    if constexpr (kLinkOf<Cell> == Link::kNorm) p.dlink[at] = dlink;
    scalar_t* const to = p.step.dgx + unit.row * G * H + unit.unit;
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) narrow(dgates[g], to[g * H]);
    unit.store_gradients();
  }
}

template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    begin_backward(const StagedBackward<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const int64_t H = p.step.hidden;
  BackwardUnit<Cell, scalar_t> unit(p.step, first_column());
  wait_for_launch_before();
  if (unit.unit >= H) return;
  for (unit.row = first_row(); unit.row < p.step.rows; unit.row += row_stride()) {
    const int64_t at = unit.row * H + unit.unit;
    // As the other half left them.
    unit.dstate[0] = Cell::kReadsH ? p.step.dh[at] : acc_t{};
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) unit.dstate[s] = p.step.dc[(s - 1) * p.step.carry_plane + at];
    unit.load_states(0);
    scalar_t* const to = p.step.dgx + unit.row * G * H + unit.unit;
    acc_t dgates[G], link{};
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) dgates[g] = widen(to[g * H]);
    make_cell<Cell>(p.step.options)
        .begin_backward(unit.saved, unit.prev, unit.next, p.dlink[at], unit.dstate, dgates, link);
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) narrow(dgates[g], to[g * H]);
    if (p.links) narrow(link, p.links[at]);
    if (p.step.h_entered) narrow(unit.prev[0], p.step.h_entered[at]);
    unit.store_gradients();
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
