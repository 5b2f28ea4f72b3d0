#include "cell_info.h"

#include "../cells/list.h"

namespace rnnfast {
namespace {

template <class Cell>
constexpr CellInfo info(const char* name) {
  return {name,
          Cell::kGates,
          Cell::kStates,
          Cell::kSaved,
          Cell::kRecurrence == RNNFAST_TARGET::Recurrence::kDense,
          Cell::kRecurrence == RNNFAST_TARGET::Recurrence::kDiagonal,
          Cell::kSplitGates};
}

#define RNNFAST_INFO(id, name, Type) info<RNNFAST_TARGET::Type>(#name),
const CellInfo kCells[] = {RNNFAST_CELLS(RNNFAST_INFO)};

}  // namespace

const int kNumCells = static_cast<int>(sizeof(kCells) / sizeof(kCells[0]));
const CellInfo& cell_info(int cell) { return kCells[cell]; }

}  // namespace rnnfast
