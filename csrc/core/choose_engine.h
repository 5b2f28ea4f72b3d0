// Which engine, split and kernel a shape gets: a pure function of printable numbers, so that it can
// be tested and explained.
#pragma once

#include <cstdint>

namespace rnnfast {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };
constexpr int kNumIsas = 4;

// How the threads divide a layer: nobody, rows of the batch (no synchronisation in the loop), or
// hidden units (a barrier a step).
enum class Split : int { kSerial = 0, kBatch = 1, kUnits = 2 };

// Where a product takes its weights: from panels packed for
// the micro-kernel, or directly from PyTorch's layout.
enum class Kernel : int { kPacked = 0, kDirect = 1, kNone = 2 };

struct Shape {
  int cell;
  int64_t seq_len, batch, input_size, hidden_size, output_size;
  int64_t rows;  // valid steps of all sequences; T*B when none is shorter
  int itemsize;
};

struct Choice {
  int threads;
  Split split;
  Kernel kernel_ih, kernel_hh;
};

// max_threads: what the thread pool offers; forced: -1, or a Kernel for both products.
Choice choose_engine(const Shape& shape, int max_threads, int forced_kernel);

}  // namespace rnnfast
