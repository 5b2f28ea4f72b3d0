// The threads that cooperate on the device on the host: what barriers, shared memory and the
// instructions of a warp do, and that what a device would leave undefined is an error here.
#include <functional>
#include <limits>
#include <stdexcept>

#include "../layers.h"
#include "core/half.h"
#include "cuda/ops/mma.cuh"
#include "cuda/ops/shared.cuh"
#include "cuda/ops/transpose.cuh"
#include "device.h"

using namespace rnnfast;
namespace engine = rnnfast::RNNFAST_TARGET;

namespace {

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, dim3 block, size_t bytes,
                   unsigned seed = 0) {
  const std::unique_ptr<on_host::Queue, void (*)(on_host::Queue*)> queue(on_host::new_queue(),
                                                                         on_host::delete_queue);
  on_host::begin_call(queue.get());
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = queue.get();
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
  on_host::run_all({queue.get()}, seed);
  return status;
}

// A run that must fail, with these words in what it says.
void check_fails(const std::function<void()>& run, const std::string& words) {
  std::string said = "nothing";
  try {
    run();
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  check(said.find(words) != std::string::npos, "an error with '" + words + "', got: " + said);
}

float* shared_floats() { return reinterpret_cast<float*>(engine::shared_memory()); }

// --- barriers ---

struct SumArgs {
  const float* x;  // of each block, one after the other
  float* sums;
};
__global__ void sum_block(SumArgs args) {
  float* parts = shared_floats();
  const unsigned t = threadIdx.x, n = blockDim.x, block = blockIdx.x + blockIdx.y * gridDim.x;
  parts[t] = args.x[block * n + t];
  __syncthreads();
  for (unsigned left = n; left > 1; left = (left + 1) / 2) {
    const unsigned half = (left + 1) / 2;
    if (t + half < left) parts[t] += parts[t + half];
    __syncthreads();
  }
  if (t == 0) args.sums[block] = parts[0];
}

void check_sums(unsigned threads, unsigned seed) {
  const dim3 grid(3, 2);
  std::vector<float> x(6 * threads), sums(6, -1), wanted(6, 0);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i % 17);
    wanted[i / threads] += x[i];
  }
  launch(sum_block, SumArgs{x.data(), sums.data()}, grid, threads, threads * sizeof(float), seed);
  check(sums == wanted, "sums of blocks of " + std::to_string(threads));
}

enum class Barrier { kNone, kWarp, kBlock };
struct RingArgs {
  Barrier after_writing, after_reading;
  unsigned distance;
  float* out;
};
// Each thread reads for some rounds what another one wrote.
__global__ void ring(RingArgs args) {
  const auto meet = [](Barrier barrier) {
    if (barrier == Barrier::kWarp) __syncwarp();
    if (barrier == Barrier::kBlock) __syncthreads();
  };
  float* numbers = shared_floats();
  const unsigned t = threadIdx.x, n = blockDim.x;
  float sum = 0;
  for (int round = 1; round <= 3; ++round) {
    numbers[t] = static_cast<float>(round * 1000 + t);
    meet(args.after_writing);
    sum += numbers[(t + args.distance) % n];
    meet(args.after_reading);
  }
  args.out[t] = sum;
}

int wrong_rings(unsigned threads, Barrier after_writing, Barrier after_reading, unsigned distance) {
  int wrong = 0;
  for (unsigned seed = 0; seed < 8; ++seed) {
    std::vector<float> out(threads), wanted(threads);
    for (unsigned t = 0; t < threads; ++t) wanted[t] = 6000.0f + 3 * ((t + distance) % threads);
    launch(ring, RingArgs{after_writing, after_reading, distance, out.data()}, 1, threads,
           threads * sizeof(float), seed);
    wrong += out != wanted;
  }
  return wrong;
}

void check_barriers() {
  for (const unsigned threads : {1u, 32u, 33u, 96u, 256u, 1024u})
    for (unsigned seed = 0; seed < 3; ++seed) check_sums(threads, seed);
  using enum Barrier;
  check(wrong_rings(128, kBlock, kBlock, 37) == 0, "a ring");
  check(wrong_rings(128, kNone, kBlock, 37) == 8, "no barrier after writing is seen");
  check(wrong_rings(128, kBlock, kNone, 37) > 4, "no barrier after reading is seen");
  check(wrong_rings(64, kWarp, kWarp, 32) > 4, "a warp's barrier is not a block's");
  check(wrong_rings(32, kWarp, kWarp, 1) == 0, "a ring in a warp");
  check(wrong_rings(32, kNone, kWarp, 1) == 8, "no warp's barrier after writing is seen");
  check(wrong_rings(32, kWarp, kNone, 1) == 8, "no warp's barrier after reading is seen");
}

// --- what goes wrong ---

enum class Fault {
  kEarlyLane,
  kEarlyWarp,
  kTwoBarriers,
  kTwoCollectives,
  kTwoProducts,
  kHalfWarp,
  kMask,
  kThrow,
};
struct FaultArgs {
  Fault fault;
  int* alive;  // fibers that have begun and not unwound
};
__global__ void faulty(FaultArgs args) {
  struct Count {
    int* of;
    explicit Count(int* counter) : of(counter) { ++*of; }
    ~Count() { --*of; }
  } const count(args.alive);
  const unsigned t = threadIdx.x;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  __syncthreads();
  switch (args.fault) {
    case Fault::kEarlyLane:
      if (t == 5) return;
      break;
    case Fault::kEarlyWarp:
      if (t >= 32) return;
      break;
    case Fault::kTwoBarriers:
      if (t == 40) __syncwarp();
      break;
    case Fault::kTwoCollectives:
      t % 2 ? engine::mma<Float16>(d, a, b) : static_cast<void>(engine::transpose_8x8(0));
      break;
    case Fault::kTwoProducts:
      t % 2 ? engine::mma<Float16>(d, a, b) : engine::mma<BFloat16>(d, a, b);
      break;
    case Fault::kHalfWarp:
      if (t % 32 < 16) engine::mma<Float16>(d, a, b);
      return;
    case Fault::kMask: __syncwarp(1); break;
    case Fault::kThrow:
      if (t == 33) throw std::runtime_error("thrown by a kernel");
      break;
  }
  __syncthreads();
}

struct NoArgs {};
__global__ void meet_alone(NoArgs) { __syncthreads(); }
__global__ void multiply(NoArgs) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  engine::mma<Float16>(d, a, b);
}
__global__ void look(NoArgs) { engine::shared_memory(); }
__global__ void multiply_unknown(NoArgs) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  on_host::mma("m16n8k8.row.col.f32.f16.f16.f32", d, a, b);
}
__global__ void multiply_unrounded(NoArgs) {
  float d[4] = {};
  const uint32_t a[4] = {0, 0, 0, threadIdx.x == 7 ? 0x3f800001u : 0}, b[2] = {};
  engine::mma<float>(d, a, b);
}

void check_faults() {
  const auto check_fault = [](Fault fault, const std::string& words) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      int alive = 0;
      check_fails([&] { launch(faulty, FaultArgs{fault, &alive}, 2, 64, 4, seed); }, words);
      check(alive == 0, "all fibers are unwound after: " + words);
    }
  };
  check_fault(Fault::kEarlyLane, "lanes of a warp must come to the same one");
  check_fault(Fault::kEarlyWarp, "a barrier must be reached by the whole block");
  check_fault(Fault::kTwoBarriers, "at __syncwarp");
  check_fault(Fault::kTwoCollectives, "at transpose_8x8");
  check_fault(Fault::kTwoProducts, "at an mma of bfloat16");
  check_fault(Fault::kHalfWarp, "at its end");
  check_fault(Fault::kMask, "must name all lanes");
  check_fault(Fault::kThrow, "thrown by a kernel");
  check_fails([] { launch(multiply, NoArgs{}, 1, 40, 4); }, "in a warp of 8 lanes");
  check_fails([] { launch(multiply_unknown, NoArgs{}, 1, 32, 4); }, "no mma is written for");
  check_fails([] { launch(multiply_unrounded, NoArgs{}, 1, 32, 4); }, "nobody rounded");
  check_fails([] { launch(meet_alone, NoArgs{}, 1, dim3(32, 2), 4); }, "must lie along x");
  // Launches without shared memory run thread after thread.
  check_fails([] { launch(meet_alone, NoArgs{}, 1, 32, 0); }, "__syncthreads needs a launch");
  check_fails([] { launch(multiply, NoArgs{}, 1, 32, 0); }, "mma needs a launch");
  check_fails([] { launch(look, NoArgs{}, 1, 32, 0); }, "shared memory needs a launch");
  check_sums(64, 0);  // and nothing of all that is left
}

// --- instructions of a warp ---

// Entry (row, column) of a matrix: in which lane, in which of its numbers.
struct Slot {
  int lane, number;
};
using SlotOf = Slot (*)(int row, int column);

Slot a16(int r, int c) { return {r % 8 * 4 + c % 8 / 2, c / 8 * 4 + r / 8 * 2 + c % 2}; }
Slot b16(int r, int c) { return {c * 4 + r % 8 / 2, r / 8 * 2 + r % 2}; }
Slot a32(int r, int c) { return {r % 8 * 4 + c % 4, c / 4 * 2 + r / 8}; }
Slot b32(int r, int c) { return {c * 4 + r % 4, r / 4}; }
Slot c32(int r, int c) { return {r % 8 * 4 + c / 2, r / 8 * 2 + c % 2}; }

struct Registers {
  uint32_t a[32][4], b[32][2];
  float d[32][4];
};
struct ProductArgs {
  Registers* warps;
  int times;
};
template <class scalar_t>
__global__ void multiply_warps(ProductArgs args) {
  const unsigned lane = threadIdx.x % 32;
  Registers& warp = args.warps[threadIdx.x / 32];
  for (int i = 0; i < args.times; ++i)
    engine::mma<scalar_t>(warp.d[lane], warp.a[lane], warp.b[lane]);
}

template <class scalar_t>
uint32_t bits_of(float x) {
  if constexpr (sizeof(scalar_t) == 4) return engine::bit_cast<uint32_t>(x);
  if constexpr (std::is_same_v<scalar_t, Float16>)
    return engine::narrow_float16<float, uint32_t>(x);
  return engine::narrow_bfloat16<float, uint32_t>(x);
}

template <class scalar_t>
void check_product(unsigned seed) {
  constexpr bool narrow = sizeof(scalar_t) == 2;
  constexpr int kDepth = narrow ? 16 : 8;
  std::mt19937 random(seed);
  // With few bits, so that a sum is the same in any order.
  const auto number = [&] { return (static_cast<int>(random() % 255) - 127) / 64.0f; };
  std::vector<Registers> warps(3);
  std::vector<std::vector<float>> wanted(3);
  for (int w = 0; w < 3; ++w) {
    Registers& warp = warps[w];
    std::memset(&warp, 0, sizeof(warp));
    float a[16][kDepth], b[kDepth][8];
    const auto place = [](uint32_t* registers, int i, float x) {
      registers[narrow ? i / 2 : i] |= bits_of<scalar_t>(x) << (narrow ? i % 2 * 16 : 0);
    };
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < kDepth; ++c) {
        const Slot slot = narrow ? a16(r, c) : a32(r, c);
        place(warp.a[slot.lane], slot.number, a[r][c] = number());
      }
    for (int r = 0; r < kDepth; ++r)
      for (int c = 0; c < 8; ++c) {
        const Slot slot = narrow ? b16(r, c) : b32(r, c);
        place(warp.b[slot.lane], slot.number, b[r][c] = number());
      }
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 8; ++c) {
        const Slot slot = c32(r, c);
        float sum = warp.d[slot.lane][slot.number] = number();
        for (int l = 0; l < kDepth; ++l) sum += 2 * a[r][l] * b[l][c];
        wanted[w].push_back(sum);
      }
  }
  launch(multiply_warps<scalar_t>, ProductArgs{warps.data(), 2}, 1, 96, 4, seed);
  for (int w = 0; w < 3; ++w) {
    std::vector<float> got;
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 8; ++c) got.push_back(warps[w].d[c32(r, c).lane][c32(r, c).number]);
    check(got == wanted[w], "a product of " + std::to_string(kDepth) + " deep");
  }
}

struct TransposeArgs {
  uint32_t* pairs;
};
__global__ void transpose(TransposeArgs args) {
  uint32_t& pair = args.pairs[threadIdx.x];
  pair = engine::transpose_8x8(pair);
}

void check_instructions() {
  for (unsigned seed = 0; seed < 3; ++seed) {
    check_product<Float16>(seed);
    check_product<BFloat16>(seed);
    check_product<float>(seed);
  }
  // Entry (r, c) is 16 r + c, two of a row in a lane.
  const auto pair = [](int first, int second) {
    return static_cast<uint32_t>(first | second << 16);
  };
  std::vector<uint32_t> pairs, wanted;
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; c += 2) {
      pairs.push_back(pair(16 * r + c, 16 * r + c + 1));
      wanted.push_back(pair(16 * c + r, 16 * (c + 1) + r));
    }
  launch(transpose, TransposeArgs{pairs.data()}, 1, 32, 4);
  check(pairs == wanted, "an 8 x 8 matrix transposed");
}

// --- launches ---

struct FilledArgs {
  size_t bytes;
  int* good;
};
// Writes what it was given, so that a later block would see it.
__global__ void look_at_filling(FilledArgs args) {
  char* bytes = engine::shared_memory();
  bool good = reinterpret_cast<uintptr_t>(bytes) % 128 == 0;
  for (size_t at = 0; at + 4 <= args.bytes; at += 4) {
    uint32_t bits;
    std::memcpy(&bits, bytes + at, 4);
    const float number = engine::bit_cast<float>(bits);
    const float half = engine::widen_float16<float>(bits & 0xffffu);
    const float brain = engine::bit_cast<float>(bits << 16);
    const float rounded = engine::bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
    good = good && number != number && half != half && brain != brain && rounded != rounded;
  }
  std::memset(bytes, 0, args.bytes);
  *args.good += good;
}

struct OrderArgs {
  std::vector<unsigned>* seen;
};
__global__ void note_order(OrderArgs args) {
  args.seen->push_back(((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.y + threadIdx.y) *
                           blockDim.x +
                       threadIdx.x);
}
__global__ void note_order_again(OrderArgs args) { note_order(args); }

void check_launches() {
  int good = 0;
  launch(look_at_filling, FilledArgs{1000, &good}, 5, 1, 1000);
  check(good == 5, "shared memory of each block is filled with NaNs");

  std::vector<unsigned> seen, wanted;
  check(launch(note_order, OrderArgs{&seen}, dim3(2, 2), dim3(3, 2), 0) == cudaSuccess, "a launch");
  for (const unsigned block : {3u, 2u, 1u, 0u})
    for (unsigned t = 0; t < 6; ++t) wanted.push_back(block * 6 + t);
  check(seen == wanted, "threads that do not cooperate run one after the other");

  const auto order = [](unsigned seed) {
    std::vector<unsigned> numbers;
    launch(note_order, OrderArgs{&numbers}, dim3(2, 2), 64, 4, seed);
    return numbers;
  };
  check(order(1) == order(1) && order(1) != order(2), "the seed gives the order");
  std::vector<unsigned> sorted = order(3);
  std::sort(sorted.begin(), sorted.end());
  bool each_once = sorted.size() == 256;
  for (size_t i = 0; i < sorted.size(); ++i) each_once = each_once && sorted[i] == i;
  check(each_once, "each thread runs once");

  const auto status = [&](size_t bytes) {
    return launch(note_order, OrderArgs{&seen}, 1, 32, bytes);
  };
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(status(48 << 10) == cudaSuccess, "48 KiB need no attribute");
  check(status((48 << 10) + 1) == cudaErrorInvalidValue, "more than 48 KiB do");
  check(cudaFuncSetAttribute(note_order, kAttribute, 232449) == cudaErrorInvalidValue,
        "no attribute beyond the device");
  check(cudaFuncSetAttribute(note_order, kAttribute, -1) == cudaErrorInvalidValue,
        "no attribute below 0");
  check(status((48 << 10) + 1) == cudaErrorInvalidValue, "an attribute that failed allows nothing");
  check(cudaFuncSetAttribute(note_order, kAttribute, 232448) == cudaSuccess, "all that there is");
  check(status(232448) == cudaSuccess, "a launch with all that there is");
  check(status(232449) == cudaErrorInvalidValue, "a launch with more");
  check(launch(note_order_again, OrderArgs{&seen}, 1, 32, 50000) == cudaErrorInvalidValue,
        "an attribute is one kernel's");
  check(cudaFuncSetAttribute(note_order, kAttribute, 60000) == cudaSuccess, "an attribute again");
  check(status(60000) == cudaSuccess && status(60001) == cudaErrorInvalidValue,
        "the last attribute holds");
  check(launch(note_order, OrderArgs{&seen}, 1, 0, 0) == cudaErrorInvalidConfiguration,
        "a block of no threads");
}

}  // namespace

int main() {
  check_barriers();
  check_faults();
  check_instructions();
  check_launches();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
