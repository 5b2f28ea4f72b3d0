// A cell's numbers, for code that does not compile the cell: bindings, checks, choose_engine.
#pragma once

#include <cstdint>

namespace rnnfast {

struct CellInfo {
  const char* name;
  int gates, states, saved, parameters;
  bool dense, diagonal, split_gates;  // w_hh is a matrix, a vector, or (neither) empty
  bool options;                       // whether a call may choose activations, and a bound of c
  bool stages;                        // whether a step is more than a product and a function
  // On the CPU: whether its bfloat16 and int8 are multiplied by instructions for them, and whether
  // there are kernels of 16 bits at all.
  bool dot_kernels, half_kernels;
};

extern const int kNumCells;
// cell must be in [0, kNumCells), or what own_cell_id or add_own_cell gave.
const CellInfo& cell_info(int cell);

// Cells that the process was given besides (cpu/own_cell.h): they get ids from here on, in the
// order in which they come, and keep them. A code (cell_code.h) names the same cell everywhere.
constexpr int kFirstOwnCell = 128, kMostOwnCells = 127;
int own_cell_id(int64_t code);                         // -1: there is none
int add_own_cell(int64_t code, const CellInfo& info);  // or the one that there is; -1: no room

}  // namespace rnnfast
