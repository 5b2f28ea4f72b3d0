// The contract of cell.h as sentences, for cells that rnnfast.load_cell compiles: what a header
// lacks is said in one line, before templates of the engine say it in a hundred.
#pragma once

#include <type_traits>

#include "../cpu/vec.h"
#include "cell.h"
#include "stages.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell>
constexpr bool kHasConstants = requires {
  typename std::integral_constant<int, Cell::kGates>;
  typename std::integral_constant<int, Cell::kStates>;
  typename std::integral_constant<int, Cell::kSaved>;
  typename std::integral_constant<Recurrence, Cell::kRecurrence>;
  typename std::integral_constant<bool, Cell::kSplitGates>;
  typename std::integral_constant<bool, Cell::kReadsH>;
};

template <class Cell, class V>
constexpr bool has_forward() {
  using P = const V(&)[at_least_one<kParametersOf<Cell>>];
  using Gates = const V(&)[Cell::kGates];
  using States = V(&)[Cell::kStates];
  using Saved = V(&)[at_least_one<Cell::kSaved>];
  if constexpr (kParametersOf<Cell> > 0)
    return requires(const Cell& cell, P p, Gates gx, Gates gh, States state, Saved saved) {
      cell.forward(p, gx, gh, state, saved);
    };
  else
    return requires(const Cell& cell, Gates gx, Gates gh, States state, Saved saved) {
      cell.forward(gx, gh, state, saved);
    };
}

template <class Cell, class V>
constexpr bool has_backward() {
  using P = const V(&)[at_least_one<kParametersOf<Cell>>];
  using Dp = V(&)[at_least_one<kParametersOf<Cell>>];
  using Saved = const V(&)[at_least_one<Cell::kSaved>];
  using States = const V(&)[Cell::kStates];
  using Dstates = V(&)[Cell::kStates];
  using Dgates = V(&)[Cell::kGates];
  if constexpr (kParametersOf<Cell> > 0)
    return requires(const Cell& cell, P p, Dp dp, Saved saved, States prev, States next,
                    Dstates dstate, Dgates dgx,
                    Dgates dgh) { cell.backward(p, dp, saved, prev, next, dstate, dgx, dgh); };
  else
    return requires(const Cell& cell, Saved saved, States prev, States next, Dstates dstate,
                    Dgates dgx, Dgates dgh) { cell.backward(saved, prev, next, dstate, dgx, dgh); };
}

// Of all types that the engine has units in: one that is a template of another form fits only some.
template <class Cell>
constexpr bool kHasForward =
    has_forward<Cell, vector_of<float>>() && has_forward<Cell, vector_of<double>>() &&
    has_forward<Cell, pair_of<float>>() && has_forward<Cell, pair_of<double>>();
template <class Cell>
constexpr bool kHasBackward =
    has_backward<Cell, vector_of<float>>() && has_backward<Cell, vector_of<double>>() &&
    has_backward<Cell, pair_of<float>>() && has_backward<Cell, pair_of<double>>();

template <class Cell>
constexpr bool fulfils_contract() {
  static_assert(
      requires { typename std::integral_constant<int, Cell::kGates>; },
      "a cell has `static constexpr int kGates`, its number of gates");
  static_assert(
      requires { typename std::integral_constant<int, Cell::kStates>; },
      "a cell has `static constexpr int kStates`, its number of states, h included");
  static_assert(
      requires { typename std::integral_constant<int, Cell::kSaved>; },
      "a cell has `static constexpr int kSaved`, what backward reads besides the states");
  static_assert(
      requires { typename std::integral_constant<Recurrence, Cell::kRecurrence>; },
      "a cell has `static constexpr Recurrence kRecurrence`, kDense, kDiagonal or kNone");
  static_assert(
      requires { typename std::integral_constant<bool, Cell::kSplitGates>; },
      "a cell has `static constexpr bool kSplitGates`, whether dgh differs from dgx");
  static_assert(
      requires { typename std::integral_constant<bool, Cell::kReadsH>; },
      "a cell has `static constexpr bool kReadsH`, whether forward reads state[0]");
  static_assert(!kHasStages<Cell>, "a cell of load_cell has no stages (kLink)");
  if constexpr (kHasConstants<Cell> && !kHasStages<Cell>) {
    static_assert(is_cell<Cell>());
    static_assert(kHasForward<Cell>,
                  "a cell has `template <class V> static void forward(const V (&gx)[kGates], const "
                  "V (&gh)[kGates], V (&state)[kStates], V (&saved)[kSaved])` (saved[1] where "
                  "kSaved is 0; behind `const V (&p)[kParameters]` if it has parameters)");
    static_assert(kHasBackward<Cell>,
                  "a cell has `template <class V> static void backward(const V (&saved)[kSaved], "
                  "const V (&prev)[kStates], const V (&next)[kStates], V (&dstate)[kStates], V "
                  "(&dgx)[kGates], V (&dgh)[kGates])` (saved[1] where kSaved is 0; behind `const V "
                  "(&p)[kParameters], V (&dp)[kParameters]` if it has parameters)");
    return kHasForward<Cell> && kHasBackward<Cell>;
  }
  return false;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
