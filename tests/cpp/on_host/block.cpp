#include "block.h"

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "fiber.h"
#include "tensor_core.h"

namespace on_host {

namespace {

// Where a thread is between its turns.
enum class At { kReady, kBarrier, kWarpBarrier, kProduct, kTranspose, kEnd };

struct Lane {
  Fiber* fiber;
  unsigned thread;
  At at = At::kReady;
  Product product{};
  ProductRegisters registers{};
  uint32_t pair = 0;
};

struct Cancelled {};  // unwinds a fiber that waits, after an error elsewhere

struct Block {
  const std::function<void()>& kernel;
  char* shared;
  std::vector<Lane> lanes;
  bool cancelled = false;
  std::exception_ptr error;

  int warps() const { return static_cast<int>((lanes.size() + kLanes - 1) / kLanes); }
};

thread_local Block* block = nullptr;
thread_local Lane* running = nullptr;
thread_local uint64_t random_state = 0;

// splitmix64: a warp draws one number each time that it runs.
uint64_t draw() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct Pool {
  std::vector<Fiber*> fibers;
  ~Pool() {
    for (Fiber* fiber : fibers) delete_fiber(fiber);
  }
};
thread_local Pool pool;

std::string name_of(const Lane& lane) {
  return "thread " + std::to_string(lane.thread) + " of block (" + std::to_string(blockIdx.x) +
         ", " + std::to_string(blockIdx.y) + ")";
}

std::string place_of(const Lane& lane) {
  switch (lane.at) {
    case At::kReady: return "on its way";
    case At::kBarrier: return "at __syncthreads";
    case At::kWarpBarrier: return "at __syncwarp";
    case At::kTranspose: return "at transpose_8x8";
    case At::kEnd: return "at its end";
    case At::kProduct: break;
  }
  const char* const types[] = {"float16", "bfloat16", "TF32"};
  return std::string("at an mma of ") + types[static_cast<int>(lane.product)];
}

[[noreturn]] void fail_apart(const Lane& one, const Lane& other, const std::string& rule) {
  throw std::runtime_error("on_host: " + name_of(one) + " is " + place_of(one) + " and thread " +
                           std::to_string(other.thread) + " " + place_of(other) + ": " + rule);
}

void run_thread(void*) {
  if (block->cancelled) return;
  try {
    block->kernel();
  } catch (const Cancelled&) {
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
}

void run_lane(Lane& lane) {
  running = &lane;
  threadIdx = dim3(lane.thread, 0, 0);
  lane.at = At::kReady;
  enter(lane.fiber);
  running = nullptr;
  if (has_ended(lane.fiber)) lane.at = At::kEnd;
}

// Where all lanes of a warp came to; what a collective does, once they are there.
void meet(Lane* lanes, int count) {
  const Lane& first = lanes[0];
  for (int i = 1; i < count; ++i) {
    const bool same_product = first.at != At::kProduct || lanes[i].product == first.product;
    if (lanes[i].at == first.at && same_product) continue;
    fail_apart(first, lanes[i], "lanes of a warp must come to the same one");
  }
  if (first.at == At::kEnd || first.at == At::kBarrier) return;
  if (first.at == At::kProduct || first.at == At::kTranspose) {
    if (count != kLanes)
      throw std::runtime_error("on_host: " + name_of(first) + " is " + place_of(first) +
                               " in a warp of " + std::to_string(count) +
                               " lanes: it takes all 32");
    if (first.at == At::kProduct) {
      ProductRegisters registers[kLanes];
      for (int i = 0; i < kLanes; ++i) registers[i] = lanes[i].registers;
      run_product(first.product, registers);
    } else {
      uint32_t pairs[kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[i] = lanes[i].pair;
      run_transpose(pairs);
      for (int i = 0; i < kLanes; ++i) lanes[i].pair = pairs[i];
    }
  }
  for (int i = 0; i < count; ++i) lanes[i].at = At::kReady;
}

// Each lane of a warp up to where it next stops.
void run_warp(int warp) {
  Lane* lanes = &block->lanes[warp * kLanes];
  const int count = std::min<int>(kLanes, block->lanes.size() - warp * kLanes);
  // An odd stride comes by every lane.
  const auto drawn = static_cast<unsigned>(draw());
  const unsigned first = drawn % kLanes, stride = (drawn / kLanes) | 1;
  for (unsigned i = 0; i < kLanes; ++i) {
    const int lane = (first + i * stride) % kLanes;
    if (lane >= count) continue;
    run_lane(lanes[lane]);
    if (block->error) std::rethrow_exception(block->error);
  }
  meet(lanes, count);
}

// A warp stops only at its end, at the barrier, or for a collective that is done at once. So when
// none is ready all of them are at one of the first two.
void run_warps() {
  const int warps = block->warps();
  const auto first_of = [](int warp) -> Lane& { return block->lanes[warp * kLanes]; };
  for (;;) {
    int ready[kLanes], count = 0;  // a block has 32 warps at most
    for (int warp = 0; warp < warps; ++warp)
      if (first_of(warp).at == At::kReady) ready[count++] = warp;
    if (count > 0) {
      const uint64_t drawn = draw();
      const int warp = ready[drawn % count];
      // It may run far ahead of the others.
      for (int turns = 1 << (drawn >> 32) % 6; turns > 0; --turns) {
        run_warp(warp);
        if (first_of(warp).at != At::kReady) break;
      }
      continue;
    }
    for (int warp = 1; warp < warps; ++warp)
      if (first_of(warp).at != first_of(0).at)
        fail_apart(first_of(0), first_of(warp), "a barrier must be reached by the whole block");
    if (first_of(0).at == At::kEnd) return;
    for (Lane& lane : block->lanes) lane.at = At::kReady;
  }
}

void run_block(Block& here) {
  for (Lane& lane : here.lanes) start(lane.fiber, run_thread, nullptr);
  block = &here;
  try {
    run_warps();
  } catch (...) {
    here.cancelled = true;
    for (Lane& lane : here.lanes)
      if (!has_ended(lane.fiber)) run_lane(lane);
    block = nullptr;
    throw;
  }
  block = nullptr;
}

// Until all lanes of the warp, or threads of the block, have come.
void stop(At at) {
  running->at = at;
  leave(running->fiber);
  if (block->cancelled) throw Cancelled{};
}

Lane& this_lane(const char* what) {
  if (!running)
    throw std::runtime_error(std::string("on_host: ") + what +
                             " needs a launch whose threads cooperate, which is one that asks for "
                             "shared memory (dynamicSmemBytes > 0)");
  return *running;
}

// Aligned as a kernel may ask for, and no longer than the launch says: the sanitizer sees beyond.
struct SharedMemory {
  static constexpr std::align_val_t kAlignment{128};
  char* bytes;
  explicit SharedMemory(size_t size) : bytes(static_cast<char*>(operator new(size, kAlignment))) {
    // 0x7fff again and again: a NaN in 16, 32 and 64 bits, also after rounding to TF32.
    for (size_t i = 0; i < size; ++i) bytes[i] = i % 2 ? char(0x7f) : char(0xff);
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { operator delete(bytes, kAlignment); }
};

std::mutex allowed_mutex;
std::map<const void*, size_t> allowed;

}  // namespace

char* shared_memory() {
  this_lane("shared memory");
  return block->shared;
}

void mma(const char* shape_and_types, float (&d)[4], const uint32_t (&a)[4],
         const uint32_t (&b)[2]) {
  Lane& lane = this_lane("mma");
  lane.product = product_of(shape_and_types);
  lane.registers = {d, a, b};
  stop(At::kProduct);
}

uint32_t transpose_8x8(uint32_t pair) {
  Lane& lane = this_lane("transpose_8x8");
  lane.pair = pair;
  stop(At::kTranspose);
  return lane.pair;
}

void seed_blocks(unsigned seed) { random_state = seed; }

void run_blocks(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads.y != 1 || threads.z != 1)
    throw std::runtime_error("on_host: threads that cooperate must lie along x, got blocks of (" +
                             std::to_string(threads.x) + ", " + std::to_string(threads.y) + ", " +
                             std::to_string(threads.z) + ")");
  while (pool.fibers.size() < threads.x) pool.fibers.push_back(new_fiber());
  gridDim = grid;
  blockDim = threads;
  const uint64_t count = uint64_t{grid.x} * grid.y;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  for (const uint64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x));
    const SharedMemory shared(shared_bytes);
    Block here{kernel, shared.bytes, {}, false, nullptr};
    for (unsigned t = 0; t < threads.x; ++t) here.lanes.push_back({pool.fibers[t], t});
    run_block(here);
  }
}

bool allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > settings.shared_bytes) return false;
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed[kernel] = static_cast<size_t>(bytes);
  return true;
}

bool may_have_shared_memory(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  const auto asked = allowed.find(kernel);
  return bytes <= (asked == allowed.end() ? 48 << 10 : asked->second) &&
         bytes <= static_cast<size_t>(settings.shared_bytes);
}

}  // namespace on_host

void __syncthreads() {
  on_host::this_lane("__syncthreads");
  on_host::stop(on_host::At::kBarrier);
}

void __syncwarp(unsigned mask) {
  on_host::this_lane("__syncwarp");
  if (mask != 0xffffffffu)
    throw std::runtime_error("on_host: __syncwarp must name all lanes, got another mask");
  on_host::stop(on_host::At::kWarpBarrier);
}
