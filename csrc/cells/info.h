// A cell's numbers, of its type.
#pragma once

#include "../core/cell_info.h"
#include "cell.h"
#include "stages.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell>
constexpr CellInfo info_of(const char* name, bool dot_kernels, bool half_kernels) {
  return {name,
          Cell::kGates,
          Cell::kStates,
          Cell::kSaved + kNormPlanes<Cell>,
          kParametersOf<Cell> + kNormParameters<Cell>,
          Cell::kRecurrence == Recurrence::kDense,
          Cell::kRecurrence == Recurrence::kDiagonal,
          Cell::kSplitGates,
          kHasOptions<Cell>,
          kHasStages<Cell>,
          kKeepsOf<Cell>,
          dot_kernels,
          half_kernels};
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
