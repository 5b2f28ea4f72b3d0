// The contract of a cell: the gate maths of one hidden unit, and nothing else.
//
// A cell is a struct with
//   kGates       number of gates G; weights stack them in PyTorch's order
//   kStates      number of states S carried from step to step; state 0 is h
//   kSaved       planes that backward needs besides the states (the engine keeps those; h is y)
//   kRecurrence  how gh comes from h: kDense (w_hh . h), kDiagonal (u * h), or kNone: gh is b_hh or
//                zeros, w_hh is empty, and what enters a step reaches the cell as `state` alone
//   kSplitGates  whether dgh differs from dgx (false lets the engine keep one buffer)
//   kReadsH      whether forward reads h_{t-1} itself, and backward gives a part of its gradient,
//                besides the way through gh
//   kParameters  (may be left out: 0) numbers that each unit has besides its weights and biases;
//                they stand behind the bias in b_hh, which then has (G + kParameters)*H numbers
//   kKeeps       (may be left out: false) whether a part of each state may stay as it was; the cell
//                is told which, and mixes it in (zoneout.h)
//   forward(gx, gh, state, saved)
//       gx, gh: pre-activations of the input and of the hidden side, biases included; V[kGates]
//       state:  in h_{t-1}, c_{t-1} ..., out h_t, c_t ...
//   backward(saved, prev, next, dstate, dgx, dgh)
//       dstate: in dL/d(h_t, c_t ...), out dL/d(h_{t-1}, c_{t-1} ...) without the way through gh,
//               which the engine adds
//   forward(p, ...), backward(p, dp, ...)   the same of a cell with parameters
//       p, dp:  V[kParameters]: this unit's, and dL/dp of this row, which the engine sums
//   forward(keep, ...), backward(keep, ...)   beside them, of a cell that keeps; keep: V[kStates]
// over a number type V (float, double or a SIMD vector of them): values in registers, no index,
// pointer, thread or size. Members that are not static read what the cell was made with: the
// options of the call, if it has a constructor of CellOptions (cells/activation.h has some).
#pragma once

#include <type_traits>

#include "../core/cell_code.h"
#include "../core/math.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

enum class Recurrence { kDense, kDiagonal, kNone };

template <int n>
constexpr int at_least_one = n > 0 ? n : 1;  // an array of length zero is not C++

template <class Cell>
constexpr bool kHasOptions = std::is_constructible_v<Cell, const CellOptions&>;

template <class Cell>
RNNFAST_HD Cell make_cell([[maybe_unused]] const CellOptions& options) {
  if constexpr (kHasOptions<Cell>)
    return Cell(options);
  else
    return Cell{};
}

template <class Cell>
constexpr int parameters_of() {
  if constexpr (requires { Cell::kParameters; })
    return Cell::kParameters;
  else
    return 0;
}
template <class Cell>
constexpr int kParametersOf = parameters_of<Cell>();

template <class Cell, class V>
RNNFAST_HD void cell_forward(const Cell& cell,
                             [[maybe_unused]] const V (&p)[at_least_one<kParametersOf<Cell>>],
                             const V (&gx)[Cell::kGates], const V (&gh)[Cell::kGates],
                             V (&state)[Cell::kStates], V (&saved)[at_least_one<Cell::kSaved>]) {
  if constexpr (kParametersOf<Cell> > 0)
    cell.forward(p, gx, gh, state, saved);
  else
    cell.forward(gx, gh, state, saved);
}

template <class Cell, class V>
RNNFAST_HD void cell_backward(const Cell& cell,
                              [[maybe_unused]] const V (&p)[at_least_one<kParametersOf<Cell>>],
                              [[maybe_unused]] V (&dp)[at_least_one<kParametersOf<Cell>>],
                              const V (&saved)[at_least_one<Cell::kSaved>],
                              const V (&prev)[Cell::kStates], const V (&next)[Cell::kStates],
                              V (&dstate)[Cell::kStates], V (&dgx)[Cell::kGates],
                              V (&dgh)[Cell::kGates]) {
  if constexpr (kParametersOf<Cell> > 0)
    cell.backward(p, dp, saved, prev, next, dstate, dgx, dgh);
  else
    cell.backward(saved, prev, next, dstate, dgx, dgh);
}

template <class Cell>
constexpr bool keeps() {
  if constexpr (requires { Cell::kKeeps; })
    return Cell::kKeeps;
  else
    return false;
}
template <class Cell>
constexpr bool kKeepsOf = keeps<Cell>();

template <class Cell>
constexpr bool is_cell() {
  static_assert(Cell::kGates >= 1 && Cell::kGates <= 4, "a cell has 1 to 4 gates");
  static_assert(Cell::kStates >= 1, "state 0 is h");
  static_assert(Cell::kSaved >= 0, "kSaved counts planes");
  static_assert(kParametersOf<Cell> >= 0, "kParameters counts numbers of a unit");
  static_assert(!kKeepsOf<Cell> || Cell::kReadsH, "what stays of h is read, and has a gradient");
  static_assert(Cell::kRecurrence != Recurrence::kDiagonal || Cell::kGates == 1,
                "a diagonal recurrence has one gate");
  return true;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
