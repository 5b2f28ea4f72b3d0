// Scans: one thread a column, or, where the columns are too few for a device, one a column and
// chunk of steps: chunks are followed, joined column by column, and then taken from what enters
// them.
#pragma once

#include <stdexcept>
#include <string>

#include "../core/scan_pass.h"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// No kernel writes what it reads, so a load need not wait for the stores before it.
struct DeviceMemory {
#ifdef __CUDA_ARCH__
  RNNFAST_HD static float read(const float* from) { return __ldg(from); }
  RNNFAST_HD static double read(const double* from) { return __ldg(from); }
  template <class half_t>
  RNNFAST_HD static half_t read(const half_t* from) {
    return {__ldg(&from->bits)};
  }
#else
  template <class scalar_t>
  RNNFAST_HD static scalar_t read(const scalar_t* from) {
    return *from;
  }
#endif
  template <class V, class scalar_t>
  RNNFAST_HD static V load(const scalar_t* from) {
    return widen(read(from));
  }
  template <class V, class scalar_t>
  RNNFAST_HD static void store(scalar_t* to, V x) {
    narrow(x, *to);
  }
};

constexpr int kScanBlocks = 2;  // a multiprocessor has registers for so many

template <class Pass>
struct ScanPlan {
  using acc_t = accumulator_of<typename Pass::scalar_t>;
  Pass pass;
  ScanChunks chunks;                   // a thread's are `steps` long, all of them one block
  acc_t *result, *product, *entering;  // (chunks, B*H); null where there is one chunk

  RNNFAST_HD int64_t columns() const { return pass.p.rows * pass.p.columns; }
  RNNFAST_HD int64_t begin(int64_t chunk) const { return chunk * chunks.steps; }
  RNNFAST_HD int64_t end(int64_t chunk) const {
    const int64_t end = begin(chunk) + chunks.steps;
    return end < pass.p.seq_len ? end : pass.p.seq_len;
  }
};

template <class Pass>
__global__ void __launch_bounds__(kThreads, kScanBlocks) follow_chunks(const ScanPlan<Pass> plan) {
  using acc_t = typename ScanPlan<Pass>::acc_t;
  const int64_t at = first_column();
  if (at >= plan.columns()) return;
  const int64_t row = at / plan.pass.p.columns, column = at % plan.pass.p.columns;
  for (int64_t chunk = first_row(); chunk < plan.chunks.count; chunk += row_stride()) {
    acc_t carried{}, product = 1;
    const int64_t end = plan.end(chunk);
    // Loads of so many steps are under way at a time.
    RNNFAST_UNROLL_8
    for (int64_t k = plan.begin(chunk); k < end; ++k)
      carried = Pass::follow(plan.pass.step(k, row), column, carried, product);
    plan.result[chunk * plan.columns() + at] = carried;
    plan.product[chunk * plan.columns() + at] = product;
  }
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, kScanBlocks) join_chunks(const ScanPlan<Pass> plan) {
  using acc_t = typename ScanPlan<Pass>::acc_t;
  const int64_t at = first_column();
  if (at >= plan.columns() || first_row() > 0) return;
  const int64_t row = at / plan.pass.p.columns, column = at % plan.pass.p.columns;
  acc_t carried = plan.pass.template start<acc_t>(row, column);
  for (int64_t chunk = 0; chunk < plan.chunks.count; ++chunk) {
    const int64_t place = chunk * plan.columns() + at;
    plan.entering[place] = carried;
    acc_t product = plan.product[place];
    const acc_t result = plan.result[place];
    if (is_tame(product, result, carried))
      carried = product * carried + result;
    else
      for (int64_t k = plan.begin(chunk), end = plan.end(chunk); k < end; ++k)
        carried = Pass::follow(plan.pass.step(k, row), column, carried, product);
  }
}

template <class Pass>
__global__ void __launch_bounds__(kThreads, kScanBlocks) take_chunks(const ScanPlan<Pass> plan) {
  using acc_t = typename ScanPlan<Pass>::acc_t;
  const int64_t at = first_column();
  if (at >= plan.columns()) return;
  const int64_t row = at / plan.pass.p.columns, column = at % plan.pass.p.columns;
  for (int64_t chunk = first_row(); chunk < plan.chunks.count; chunk += row_stride()) {
    acc_t carried = plan.entering ? plan.entering[chunk * plan.columns() + at]
                                  : plan.pass.template start<acc_t>(row, column);
    const int64_t end = plan.end(chunk);
    RNNFAST_UNROLL_8
    for (int64_t k = plan.begin(chunk); k < end; ++k)
      carried = Pass::take(plan.pass.step(k, row), column, carried);
    if (chunk == plan.chunks.count - 1) plan.pass.end(row, column, carried);
  }
}

// By sizes alone, so that results do not depend on the device.
template <class Args>
ScanChunks scan_chunks_of(const Args& args) {
  constexpr int64_t kEnoughThreads = 1 << 17, kLeastSteps = 64;
  const int64_t columns = args.rows * args.columns;
  const int64_t wanted = kEnoughThreads / columns, most = args.seq_len / kLeastSteps;
  const int64_t count = wanted < most ? wanted : most;
  if (count < 2) return {1, args.seq_len};
  const int64_t steps = (args.seq_len + count - 1) / count;
  return {(args.seq_len + steps - 1) / steps, steps};
}

template <class Args>
int64_t scan_room_of(const Args& args) {
  const ScanChunks chunks = scan_chunks_of(args);
  if (chunks.count < 2) return 0;
  return 3 * chunks.count * args.rows * args.columns *
         static_cast<int64_t>(sizeof(accumulator_of<typename Args::scalar_t>));
}

template <template <class, class> class PassOf, class Args>
void run_scan(const Args& args, cudaStream_t stream, char* room) {
  using Pass = PassOf<typename Args::scalar_t, DeviceMemory>;
  ScanPlan<Pass> plan{{args}, scan_chunks_of(args), nullptr, nullptr, nullptr};
  const auto launch = [&](const char* name, void (*kernel)(ScanPlan<Pass>), int64_t chunks) {
    const Grid grid = grid_of(chunks, plan.columns());
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.stream = stream;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, plan);
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error of a launch is not left for the next caller
    throw std::runtime_error(std::string("rnnfast: the CUDA engine failed in ") + name +
                             " (T=" + std::to_string(args.seq_len) +
                             " B*H=" + std::to_string(plan.columns()) +
                             "): " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
  };
  if (plan.chunks.count > 1) {
    const int64_t numbers = plan.chunks.count * plan.columns();
    plan.result = reinterpret_cast<typename ScanPlan<Pass>::acc_t*>(room);
    plan.product = plan.result + numbers;
    plan.entering = plan.product + numbers;
    launch("follow_chunks", follow_chunks<Pass>, plan.chunks.count);
    launch("join_chunks", join_chunks<Pass>, 1);
  }
  launch("take_chunks", take_chunks<Pass>, plan.chunks.count);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
