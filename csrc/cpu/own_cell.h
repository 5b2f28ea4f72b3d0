// A cell that was compiled at run time (rnnfast.load_cell): what its library hands to the engine,
// and how the engine finds its kernels.
#pragma once

#include <string>

#include "../core/cell_info.h"
#include "dispatch.h"
#include "team.h"

namespace rnnfast {

struct OwnKernels {
  ForwardKernels<float> forward32;
  ForwardKernels<double> forward64;
  BackwardKernels<float> backward32;
  BackwardKernels<double> backward64;
};

// What kernels call of the engine: its symbols are hidden.
struct TeamCalls {
  void (*barrier)(const Worker&);
  void (*note_done)(StepsDone*, const Worker&, int64_t);
  void (*wait_for)(const StepsDone*, const Worker&, int64_t);
};

// What the library's one function, rnnfast_own_cell, gives. It lives as long as the process.
struct OwnCell {
  const char* engine;  // of which headers it was made: first, for the rest may be another's
  Isa isa;             // one that has kernels: kPortable, kAvx2, kAvx512 or kNeon
  CellInfo info;
  OwnKernels kernels;
  void (*connect)(const TeamCalls&);
};

// The headers that this library was made of.
extern const char* const kEngineStamp;

// From then on the code (core/cell_code.h) names the cell. A code may come again, with the kernels
// of another instruction set. Returns what is wrong, or nothing.
std::string register_own_cell(int64_t code, const OwnCell& cell);

// Throws if the cell was not compiled for the ISA.
const OwnKernels& own_kernels(Isa isa, int cell);

}  // namespace rnnfast
