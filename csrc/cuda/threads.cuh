// How the threads of a kernel lie over rows and columns, and where a launch meets the one before.
#pragma once

#include <cuda_runtime.h>

#include "convert.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int kThreads = 256;
// Blocks that a multiprocessor has registers for. Without it, the compiler spills a few in kernels
// that could do with more.
template <class scalar_t>
constexpr int kBlocks = sizeof(accumulator_of<scalar_t>) > 4 ? 2 : 4;

// A block covers a power of two of columns and as many rows as its threads allow; blocks go on over
// the rows, of which there may be more than a grid has places.
struct Grid {
  dim3 blocks, threads;
};
inline Grid grid_of(int64_t rows, int64_t columns) {
  constexpr int64_t kMostColumns = 128, kMostBlocks = 65535;
  int64_t wide = 32;
  while (wide < columns && wide < kMostColumns) wide *= 2;
  const int64_t high = kThreads / wide;
  const int64_t up = (rows + high - 1) / high;
  Grid grid;
  grid.threads = dim3(static_cast<unsigned>(wide), static_cast<unsigned>(high));
  grid.blocks = dim3(static_cast<unsigned>((columns + wide - 1) / wide),
                     static_cast<unsigned>(up < kMostBlocks ? up : kMostBlocks));
  return grid;
}

__device__ inline int64_t first_column() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}
__device__ inline int64_t row_stride() { return static_cast<int64_t>(gridDim.y) * blockDim.y; }

// Of a programmatic dependent launch, which starts while the one before still runs: nothing that an
// earlier launch wrote may be read above this. Of a plain one it does nothing.
__device__ inline void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
