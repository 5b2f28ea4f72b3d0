#include "cell_info.h"

#include "../cells/list.h"

namespace rnnfast {
namespace {

template <class Cell>
constexpr CellInfo info(const char* name, bool dot_kernels, bool half_kernels) {
  return {name,
          Cell::kGates,
          Cell::kStates,
          Cell::kSaved,
          RNNFAST_TARGET::kParametersOf<Cell>,
          Cell::kRecurrence == RNNFAST_TARGET::Recurrence::kDense,
          Cell::kRecurrence == RNNFAST_TARGET::Recurrence::kDiagonal,
          Cell::kSplitGates,
          RNNFAST_TARGET::kHasOptions<Cell>,
          RNNFAST_TARGET::kHasStages<Cell>,
          RNNFAST_TARGET::kKeepsOf<Cell>,
          dot_kernels,
          half_kernels};
}

#define RNNFAST_COUNT(id, name, Type) +1
constexpr int kWithDotKernels = RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_COUNT);
constexpr int kWithHalfKernels = RNNFAST_CELLS_OF_ALL_TYPES(RNNFAST_COUNT);

#define RNNFAST_INFO(id, name, Type) \
  info<RNNFAST_TARGET::Type>(#name, (id) < kWithDotKernels, (id) < kWithHalfKernels),
const CellInfo kCells[] = {RNNFAST_CELLS(RNNFAST_INFO)};

}  // namespace

const int kNumCells = static_cast<int>(sizeof(kCells) / sizeof(kCells[0]));
const CellInfo& cell_info(int cell) { return kCells[cell]; }

}  // namespace rnnfast
