// The CPU engine's door: the instruction set and what is forced (dispatch.cpp), the choice, the
// threads and the scratch memory of a pass or several (run.cpp), packed weights
// (packed_weights.cpp).
#pragma once

#include "../core/args.h"
#include "../core/choose_engine.h"
#include "../core/scan_args.h"
#include "team.h"

namespace rnnfast {

template <class scalar_t>
struct BatchNormArgs;
template <class scalar_t>
struct BatchNormBackwardArgs;

// What one instruction set's object offers for one cell and one format (formats.h). Scratch sizes
// are in bytes.
template <class tensor_t>
struct ForwardKernels {
  int64_t (*scratch)(const ForwardArgs<tensor_t>&, const Choice&);
  void (*run)(const ForwardArgs<tensor_t>&, const Choice&, char* scratch, const Worker&);
  int64_t (*packed_bytes)(int64_t input_size, int64_t hidden_size, int64_t output_size,
                          bool projection);
  void (*pack)(const LayerArgs<tensor_t>&, char* packed);
};

template <class scalar_t>
struct BackwardKernels {
  int64_t (*scratch)(const BackwardArgs<scalar_t>&, const Choice&);
  void (*run)(const BackwardArgs<scalar_t>&, const Choice&, char* scratch, const Worker&);
};

// Weights as bytes, in the shapes of w_ih, w_hh and w_hr, and a scale for each of their rows. A
// diagonal w_hh stays as it is.
struct Int8Weights {
  const int8_t *w_ih, *w_hh, *w_hr;
  const float *scale_ih, *scale_hh, *scale_hr;
};

// Columns of a matrix of bytes whose sums, up to 255 * 127 a column, an int32 holds.
constexpr int64_t kLongestInt8 = 1 << 16;

struct Int8Kernels {
  ForwardKernels<float> forward;  // without pack
  void (*pack)(const LayerArgs<float>& sizes, const Int8Weights&, char* packed);
};

// A weight's gradient for each of `samples`: left (steps, samples * batch, rows), right (steps,
// samples * batch, columns), out (samples, rows, columns).
template <class scalar_t>
struct SampleProduct {
  int64_t steps, samples, batch, rows, columns;
  const scalar_t *left, *right;
  scalar_t* out;
};

template <class scalar_t>
struct SampleKernel {
  int64_t (*scratch)(const SampleProduct<scalar_t>&);  // of one thread
  void (*run)(const SampleProduct<scalar_t>&, int64_t begin, int64_t end, char* scratch);
};

template <class scalar_t>
struct ScanKernels {
  int64_t (*bytes)(int64_t rows, int64_t columns, const ScanChunks&, int workers);
  void (*forward)(const ScanArgs<scalar_t>&, const ScanChunks&, char* memory, const Worker&);
  void (*backward)(const ScanBackwardArgs<scalar_t>&, const ScanChunks&, char* memory,
                   const Worker&);
};

// The LSTM with batch normalisation (core/batch_norm_args.h), an engine of its own.
template <class scalar_t>
struct BatchNormKernels {
  int64_t (*forward_bytes)(const BatchNormArgs<scalar_t>&, int workers);
  void (*forward)(const BatchNormArgs<scalar_t>&, char* memory, const Worker&);
  int64_t (*backward_bytes)(const BatchNormBackwardArgs<scalar_t>&, int workers);
  void (*backward)(const BatchNormBackwardArgs<scalar_t>&, char* memory, const Worker&);
};

enum class MathFunction : int { kExp = 0, kSigmoid = 1, kTanh = 2 };

struct KernelTable {
  // One entry a cell.
  const ForwardKernels<float>* float32;
  const ForwardKernels<double>* float64;
  const ForwardKernels<BFloat16>*bfloat16, *dot_bfloat16;  // dot: null without such instructions
  const ForwardKernels<Float16>* float16;
  const Int8Kernels* int8;
  const BackwardKernels<float>* backward32;
  const BackwardKernels<double>* backward64;
  SampleKernel<float> samples32;
  SampleKernel<double> samples64;
  ScanKernels<float> scan32;
  ScanKernels<double> scan64;
  ScanKernels<BFloat16> scan_bfloat16;
  ScanKernels<Float16> scan_float16;
  const BatchNormKernels<float>* batch_norm32;
  const BatchNormKernels<double>* batch_norm64;
  DotProduct int8_product;  // where no instruction does it
  void (*widen)(int64_t count, bool brain, const uint16_t* in, float* out);
  void (*narrow)(int64_t count, bool brain, const float* in, uint16_t* out);
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
// As force_kernel, with a Split.
int force_split(int split);
int forced_split();
const KernelTable& kernels(Isa isa);

struct Threads {
  int count;  // of the pool
  ParallelFor parallel_for;
};

// How packed weights are laid out, beside the types of their tensors.
enum class WeightFormat : int { kPlain = 0, kDot = 1, kInt8 = 2 };

// What the calling thread's last call ran on.
struct LastRun {
  Isa isa;
  int threads;
  Choice choice;
  int64_t runs;
  int64_t time;  // nanoseconds of the steady clock
};
const LastRun& last_run();
// Of what has no choice of its own; in full width.
void note_plain_run(int threads, const Choice& choice);

Machine machine_with(int threads);
Choice choose_for(const Shape& shape, int threads);
GroupChoice choose_group_for(const Group& group, int threads);

// The ISA is an argument, read once an operator: packed weights fit one ISA, and another thread may
// force another one meanwhile.
template <class scalar_t>
void run_forward(Isa isa, int cell, ForwardArgs<scalar_t>& args, WeightFormat format,
                 const Threads& threads);
template <class scalar_t>
void run_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args, const Threads& threads);

// Several passes of one call (core/choose_engine.h): the directions of a layer, or layers that read
// one another, first to run first. Side by side, or one after the other.
template <class scalar_t>
void run_forward_group(Isa isa, int cell, ForwardArgs<scalar_t>* args, const WeightFormat* formats,
                       int count, bool chained, const Threads& threads);
template <class scalar_t>
void run_backward_group(Isa isa, int cell, BackwardArgs<scalar_t>* args, int count, bool chained,
                        const Threads& threads);

// Threads take whole samples.
template <class scalar_t>
void run_sample_product(const SampleProduct<scalar_t>& product, const Threads& threads);

// Of at least one step, row and column.
template <class scalar_t>
void run_scan(const ScanArgs<scalar_t>& args, const Threads& threads);
template <class scalar_t>
void run_scan(const ScanBackwardArgs<scalar_t>& args, const Threads& threads);

// Of at least one step and row.
template <class scalar_t>
void run_batch_norm(const BatchNormArgs<scalar_t>& args, const Threads& threads);
template <class scalar_t>
void run_batch_norm(const BatchNormBackwardArgs<scalar_t>& args, const Threads& threads);

// Packed weights: a header that tells what they were made for, then panels.
template <class scalar_t>
int64_t packed_bytes(Isa isa, int cell, const LayerArgs<scalar_t>& args);
template <class scalar_t>
void pack_weights(Isa isa, int cell, const LayerArgs<scalar_t>& args, char* packed);
int64_t packed_bytes_int8(Isa isa, int cell, const LayerArgs<float>& args);
void pack_weights_int8(Isa isa, int cell, const LayerArgs<float>& args, const Int8Weights& weights,
                       char* packed);
// Whether `size` bytes at `packed` were made for this ISA, cell, type and sizes; then sets
// args.packed and `format`.
template <class scalar_t>
bool take_packed(Isa isa, int cell, const char* packed, int64_t size, ForwardArgs<scalar_t>& args,
                 WeightFormat& format);

// out[i] = in[i] in the other type.
template <class half_t>
void widen(int64_t count, const half_t* in, float* out);
template <class half_t>
void narrow(int64_t count, const float* in, half_t* out);

}  // namespace rnnfast
