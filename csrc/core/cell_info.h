// A cell's numbers, for code that does not compile the cell: bindings, checks, choose_engine.
#pragma once

namespace rnnfast {

struct CellInfo {
  const char* name;
  int gates, states, saved, parameters;
  bool dense, diagonal, split_gates;  // w_hh is a matrix, a vector, or (neither) empty
  bool options;                       // whether a call may choose activations, and a bound of c
  bool stages;                        // whether a step is more than a product and a function
  bool keeps;                         // whether a part of its states may stay as it was
  // On the CPU: whether its bfloat16 and int8 are multiplied by instructions for them, and whether
  // there are kernels of 16 bits at all.
  bool dot_kernels, half_kernels;
};

extern const int kNumCells;
const CellInfo& cell_info(int cell);  // cell must be in [0, kNumCells)

}  // namespace rnnfast
