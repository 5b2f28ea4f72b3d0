// What a pass is expected to take on a GPU, and what it can't beat: a pure function of numbers.
//
// Its rates are other people's measurements, or assumptions; none was measured by this project. It
// explains and ranks, and chooses nothing, until it is fitted to committed measurements.
#pragma once

#include <string>
#include <vector>

#include "choose_cuda.h"
#include "onchip.h"

namespace rnnfast {

// Rates of an H100 (SXM). [pub]: published by others for Hopper, as docs/kernels.md names them;
// [arch]: what the architecture is said to do a clock; [count]: counted in machine code; [assumed].
struct CudaRates {
  double clock = 1755;        // clocks a microsecond [assumed: the H800 of the published latencies]
  int multiprocessors = 132;  // of the device that the rates of the whole chip belong to

  // mma.sync of 16 rows and 8 columns: 2048 multiplications of 16 bits, 1024 of TF32. Clocks of a
  // tensor core (four a multiprocessor) at its peak [arch: 989 TFLOP/s], what mma.sync reaches of
  // it, and clocks until one that depends on it can follow [pub: H800, m16n8k16].
  double mma_clocks = 4, mma_share = 0.63, mma_latency = 24;
  // What a large product of cuBLAS reaches of the peak [assumed].
  double library_share = 0.65;
  // A clock and multiprocessor: instructions of single numbers, and those of special functions
  // (1/x) [arch].
  double instructions = 128, special = 16;
  // Of exp, sigmoid or tanh as csrc/core/math.h has it: instructions [count: sm_90a, nvcc 13.0],
  // of these special functions, and clocks from its argument to its result [assumed: 4 a dependent
  // instruction].
  double activation = 33, activation_special = 1, activation_latency = 130;
  // Instructions for each gate of a unit beside its maths: gx, bias, what is kept, conversions
  // [assumed].
  double around_gate = 8;

  // Bytes a clock and multiprocessor: from its shared memory, from another's through the cluster
  // network [pub: H800, 2.65 TB/s in clusters of 4], and from the second cache [arch].
  double shared = 128, cluster = 11.4, second_cache_each = 64;
  // Bytes a microsecond of the whole chip: second cache [assumed: 8.6 MB in 1.6 us], memory [arch:
  // H100; an H200 has 4.8e6]; and bytes that the second cache keeps [arch].
  double second_cache = 5.4e6, memory = 3.35e6, second_cache_bytes = 50e6;

  // Microseconds. A barrier of a block, and reading what was written before it [assumed: 30 clocks;
  // pub: 29, H800].
  double block_barrier = 0.034;
  // A push into the other blocks of a cluster that an mbarrier counts [assumed: above one access of
  // 180 clocks, 0.10 us, H800, and below the 0.65 us of a cluster's barrier, H100].
  double cluster_push = 0.25;
  // From a release to an acquire that sees it [pub: H100, 0.651] and a read of the second cache
  // behind it [pub: H800, 263 clocks]. A barrier of the grid takes 1.07 to 1.09 [pub: H100].
  double through_cache = 0.80;
  // From a kernel to one that depends on it [assumed: between the ramp of a launch, 1.24, and a
  // graph's relaunch, 1.40, pub: H100].
  double launch = 1.3;
};

// The same with exp and 1/x as the special function units have them.
CudaRates with_special_functions(CudaRates rates = {});

struct CudaPass {
  Shape shape;
  Operand operand;
  bool backward;
  bool saving;  // forward keeps what backward will read
};

// Of a step, in microseconds; they add up. Of those that overlap (the first three, and `input` with
// all) the longest counts in full and a quarter of the others.
struct CudaParts {
  double product;   // operations, or the wait of one for the one before
  double weights;   // w_hh from shared memory; in the step engine, from the second cache
  double operands;  // what the product reads beside weights, and sums that meet
  double gates;
  double exchange;  // latency
  double gathered;  // bytes from other blocks
  double input;     // gx, and what is kept or was
  double sum() const { return product + weights + operands + gates + exchange + gathered + input; }
};

// What no implementation of that kind can be below, of a step, in microseconds; the greatest
// counts.
struct CudaFloors {
  double operations, weights, gathered, exchanges, gates;
  double greatest() const;
  const char* binding() const;  // the name of the greatest
};

struct CudaEstimate {
  const char* engine = "step";       // or the name of an exchange
  const OnchipTile* tile = nullptr;  // null: the step engine, or none fits (total is 0)
  int at_once = 1;                   // groups that the device runs at the same time
  int rounds = 1;                    // that the tiles of the batch take
  CudaParts parts{};                 // all rounds
  CudaFloors floors{};               // all rounds
  double step = 0;
  double start = 0;   // once: launch, and weights on their way to the chip
  double around = 0;  // products over all steps: of the input, and in backward of the weights
  double total = 0;
  std::string
      why_not;  // the engine can't serve the pass on this device (the estimate may still be there)
};

CudaEstimate estimate_step_engine(const CudaPass& pass, const CudaDevice& device,
                                  const CudaRates& rates = {});
// Of a tile, whether it has a kernel or not; its units, not the layer's, are computed.
CudaEstimate estimate_tile(const OnchipTile& tile, const CudaPass& pass, const CudaDevice& device,
                           const CudaRates& rates = {});

// The step engine and each exchange, with the fastest of its tiles: first those that can serve by
// their time, then the others by theirs, then those that no tile fits.
std::vector<CudaEstimate> rank_engines(const CudaPass& pass, const CudaDevice& device,
                                       const CudaRates& rates = {});
CudaEstimate best_engine(const CudaPass& pass, const CudaDevice& device,
                         const CudaRates& rates = {});

}  // namespace rnnfast
