// A cell's numbers, for code that does not compile the cell: bindings, checks, choose_engine.
#pragma once

namespace rnnfast {

struct CellInfo {
  const char* name;
  int gates, states, saved;
  bool dense, diagonal, split_gates;  // w_hh is a matrix, a vector, or (neither) empty
};

extern const int kNumCells;
const CellInfo& cell_info(int cell);  // cell must be in [0, kNumCells)

}  // namespace rnnfast
