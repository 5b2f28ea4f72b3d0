// Which engine, split and kernel a shape gets: a pure function of printable numbers, so that it can
// be tested and explained.
#pragma once

#include <cstdint>

namespace rnnfast {

// kAvx512Bf16 and kAmx are kAvx512 with more instructions for 16-bit and 8-bit products
// (cpu/dot.h): AVX512_BF16 and AVX512_VNNI, then AMX.
enum class Isa : int {
  kPortable = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kNeon = 3,
  kAvx512Bf16 = 4,
  kAmx = 5
};
constexpr int kNumIsas = 6;

// How the threads divide a layer: nobody, rows of the batch (no synchronisation in the loop), or
// hidden units (a barrier a step). Calls with several passes have two more: both directions of a
// layer at once, and layers each a chunk of steps behind the one whose results it reads.
enum class Split : int { kSerial = 0, kBatch = 1, kUnits = 2, kDirections = 3, kLayers = 4 };

// Where a product takes its weights: from panels packed for
// the micro-kernel, or directly from PyTorch's layout.
enum class Kernel : int { kPacked = 0, kDirect = 1, kNone = 2 };

struct Shape {
  int cell;
  int64_t seq_len, batch, input_size, hidden_size, output_size;
  int64_t rows;  // valid steps of all sequences; T*B when none is shorter
  int itemsize;
  bool packed = false;   // the weights are, before the call
  bool drops_h = false;  // a mask drops entries of h where it enters the product
};

// The machine as the model sees it.
struct Machine {
  int max_threads;        // what the thread pool offers
  int64_t private_cache;  // bytes of the cache that a core has for itself
};

// What a forward pass is expected to take, in microseconds, and of what it consists.
struct Estimate {
  double products;  // operations at the micro-kernel's speed, or the weights' way to the core
  double cells;     // gate maths
  double packing;
  double meetings;  // waking threads, barriers, and the exchange of h
  double total() const { return products + cells + packing + meetings; }
};

// Rows that a pass handles together: of the input projection, whose result stays in the second
// cache, and of the weights' gradients, as the depth of their products (which decides their bits).
constexpr int64_t kForwardChunkRows = 128;
constexpr int64_t kBackwardChunkRows = 512;

struct Choice {
  int threads;
  Split split;
  Kernel kernel_ih, kernel_hh;
  int64_t chunk_rows = kForwardChunkRows;  // of forward
};

// What is forced: -1, or a Kernel for both products, or a Split (with as many threads, or passes at
// once, as it can use; of those of several passes, the choice within a pass is free).
struct Wish {
  int kernel = -1, split = -1;
};

Choice choose_engine(const Shape& shape, const Machine& machine, const Wish& wish);

// The model behind the choice: `threads` threads with a split, and the kernels of `choice`.
double wake_time(int threads);
Estimate estimate(const Shape& shape, const Machine& machine, const Choice& choice);

// Passes of one call: the directions of a layer, or (`chained`) layers that read one another.
struct Group {
  const Shape* passes;
  int count;
  bool chained, backward;
};

// How they run: `teams` of them at the same time, each with the threads of `each`. One team: one
// after the other, each with a choice of its own.
struct GroupChoice {
  int teams;
  Choice each;
  // What the model gives the passes one by one, and the best way of side by side (0: there is
  // none); microseconds.
  double one_by_one = 0, side_by_side = 0;
};
GroupChoice choose_group(const Group& group, const Machine& machine, const Wish& wish);

}  // namespace rnnfast
