// What the parts of an engine that never call a cell know of one. They are compiled once a type and
// not once a cell, so these numbers come when they run.
#pragma once

#include "stages.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct CellShape {
  int gates, free_gates, linked_gates;  // all; those that h, and the link, is multiplied with
  int states, saved;
  int planes;  // all that is kept, but for h before a projection
  int parameters, norm_parameters;
  Recurrence recurrence;
  bool split_gates, stages, norms_gates;
};

template <class Cell>
constexpr CellShape shape_of() {
  return {.gates = Cell::kGates,
          .free_gates = kFreeGatesOf<Cell>,
          .linked_gates = kLinkedGatesOf<Cell>,
          .states = Cell::kStates,
          .saved = Cell::kSaved,
          .planes = Cell::kSaved + Cell::kStates - 1 + kNormPlanes<Cell>,
          .parameters = kParametersOf<Cell>,
          .norm_parameters = kNormParameters<Cell>,
          .recurrence = Cell::kRecurrence,
          .split_gates = Cell::kSplitGates,
          .stages = kHasStages<Cell>,
          .norms_gates = kNormsGates<Cell>};
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
