// A cell that was compiled for CUDA at run time (rnnfast.load_cell): what its library hands to the
// engine, and how the engine finds its calls. cpu/own_cell.h is the same for the CPU.
#pragma once

#include <string>

#include "../core/cell_info.h"
#include "engine.h"

namespace rnnfast {

struct OwnCudaCalls {
  CellCalls<float> float32;
  CellCalls<double> float64;
  CellCalls<Float16> float16;
  CellCalls<BFloat16> bfloat16;
};

// What the library's one function, rnnfast_own_cuda_cell, gives. It lives as long as the process.
struct OwnCudaCell {
  const char* engine;  // of which headers it was made: first, for the rest may be another's
  CellInfo info;
  OwnCudaCalls calls;
};

// From then on the code (core/cell_code.h) names the cell. Returns what is wrong, or nothing.
std::string register_own_cuda_cell(int64_t code, const OwnCudaCell& cell);

// Of an id from kFirstOwnCell on.
const OwnCudaCalls& own_cuda_calls(int cell);
inline const CellCalls<float>& own_calls(int cell, float) { return own_cuda_calls(cell).float32; }
inline const CellCalls<double>& own_calls(int cell, double) { return own_cuda_calls(cell).float64; }
inline const CellCalls<Float16>& own_calls(int cell, Float16) {
  return own_cuda_calls(cell).float16;
}
inline const CellCalls<BFloat16>& own_calls(int cell, BFloat16) {
  return own_cuda_calls(cell).bfloat16;
}

}  // namespace rnnfast
