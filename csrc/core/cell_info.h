// A cell's numbers, for code that does not compile the cell: bindings, checks, choose_engine.
#pragma once

namespace rnnfast {

struct CellInfo {
  const char* name;
  int gates, states, saved;
  bool dense, diagonal, split_gates;  // w_hh is a matrix, a vector, or (neither) empty
  bool options;                       // whether a call may choose activations, and a bound of c
  bool dot_kernels;  // whether the CPU multiplies its bfloat16 and int8 by instructions for them
};

extern const int kNumCells;
const CellInfo& cell_info(int cell);  // cell must be in [0, kNumCells)

}  // namespace rnnfast
