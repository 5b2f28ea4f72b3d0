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
//   forward(gx, gh, state, saved)
//       gx, gh: pre-activations of the input and of the hidden side, biases included; V[kGates]
//       state:  in h_{t-1}, c_{t-1} ..., out h_t, c_t ...
//   backward(saved, prev, next, dstate, dgx, dgh)
//       dstate: in dL/d(h_t, c_t ...), out dL/d(h_{t-1}, c_{t-1} ...) without the way through gh,
//               which the engine adds
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
constexpr bool is_cell() {
  static_assert(Cell::kGates >= 1 && Cell::kGates <= 4, "a cell has 1 to 4 gates");
  static_assert(Cell::kStates >= 1, "state 0 is h");
  static_assert(Cell::kSaved >= 0, "kSaved counts planes");
  static_assert(Cell::kRecurrence != Recurrence::kDiagonal || Cell::kGates == 1,
                "a diagonal recurrence has one gate");
  return true;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
