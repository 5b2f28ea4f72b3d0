// The CPU engine's door: picks the instruction set, the threads and the scratch memory, and runs
// one direction of one layer.
#pragma once

#include "../core/args.h"
#include "../core/choose_engine.h"
#include "team.h"

namespace rnnfast {

// What one instruction set's object offers for one cell and
// one number type. Scratch sizes are in bytes.
template <class scalar_t>
struct CellKernels {
  int64_t (*forward_scratch)(const ForwardArgs<scalar_t>&, const Choice&);
  void (*forward)(const ForwardArgs<scalar_t>&, const Choice&, char* scratch, const Worker&);
  int64_t (*backward_scratch)(const BackwardArgs<scalar_t>&, const Choice&);
  void (*backward)(const BackwardArgs<scalar_t>&, const Choice&, char* scratch, const Worker&);
  // in elements
  int64_t (*packed_size)(int64_t input_size, int64_t hidden_size, int64_t output_size,
                         bool projection);
  void (*pack)(const LayerArgs<scalar_t>&, scalar_t* packed);
};

enum class MathFunction : int { kExp = 0, kSigmoid = 1, kTanh = 2 };

struct KernelTable {
  const CellKernels<float>* float32;  // one entry a cell
  const CellKernels<double>* float64;
  void (*math32)(MathFunction, int64_t count, const float* in, float* out);
  void (*math64)(MathFunction, int64_t count, const double* in, double* out);
  // out (rows, units) = a (rows, k) . w (units, k)^T by the given kernel, one panel after the
  // other, for the tests.
  void (*product32)(Kernel, int64_t rows, int64_t units, int64_t k_size, const float* a,
                    const float* w, float* out);
  void (*product64)(Kernel, int64_t rows, int64_t units, int64_t k_size, const double* a,
                    const double* w, double* out);
  // One tile of the micro-kernel over and over: operations
  // a second when divided by its time (bench/limits.py).
  int64_t (*spin_tile)(int64_t repeats);
};

bool isa_available(Isa isa);  // built in, and this processor has it
const char* isa_name(Isa isa);
Isa active_isa();
// Forces an ISA (-1: the best one again) for the process. Returns what was forced before, -1 for
// none. Must be available.
int force_isa(int isa);
int forced_isa();
// -1: as choose_engine says; else a Kernel. Returns what was forced before.
int force_kernel(int kernel);
int forced_kernel();
const KernelTable& kernels(Isa isa);

struct Threads {
  int count;  // of the pool
  ParallelFor parallel_for;
};

// What the calling thread's last call ran on.
struct LastRun {
  Isa isa;
  int threads;
  Choice choice;
  int64_t runs;
};
const LastRun& last_run();

Choice choose_for(const Shape& shape, int threads);

// The ISA is an argument, read once an operator: packed weights fit one ISA, and another thread may
// force another one meanwhile.
template <class scalar_t>
void run_forward(Isa isa, int cell, const ForwardArgs<scalar_t>& args, const Threads& threads);
template <class scalar_t>
void run_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args, const Threads& threads);

// Packed weights: a header that tells what they were made for, then panels. Sizes in elements.
template <class scalar_t>
int64_t packed_size(Isa isa, int cell, const LayerArgs<scalar_t>& args);
template <class scalar_t>
void pack_weights(Isa isa, int cell, const LayerArgs<scalar_t>& args, scalar_t* packed);
// The panels behind a header that was made for this ISA, cell and sizes, or null.
template <class scalar_t>
const scalar_t* panels_of(Isa isa, int cell, const LayerArgs<scalar_t>& args,
                          const scalar_t* packed);

}  // namespace rnnfast
