// Sums over the threads of a block, in an order of their own: bits depend on nothing but what the
// threads bring.
#pragma once

#include "ops/shared.cuh"
#include "threads.cuh"

#ifdef __CUDACC__
#define RNNFAST_DEVICE __device__ __forceinline__  // what a lambda reads stays in registers
#else
#define RNNFAST_DEVICE inline
#endif

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Of shared memory, for n sums at once.
template <unsigned threads, int n, class acc_t>
constexpr int kBlockSumsShared = static_cast<int>(threads * n * sizeof(acc_t));

// Each value becomes the sum of those that threads hold whose index is the same modulo `apart`, a
// power of two as `threads` is.
template <unsigned threads, unsigned apart, int n, class acc_t>
RNNFAST_DEVICE void block_sums(acc_t (&values)[n]) {
  acc_t* const sums = reinterpret_cast<acc_t*>(shared_memory());
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) sums[k * threads + threadIdx.x] = values[k];
  __syncthreads();
  for (unsigned half = threads / 2; half >= apart; half /= 2) {
    if (threadIdx.x < half) {
      RNNFAST_UNROLL
      for (int k = 0; k < n; ++k)
        sums[k * threads + threadIdx.x] += sums[k * threads + threadIdx.x + half];
    }
    __syncthreads();
  }
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) values[k] = sums[k * threads + threadIdx.x % apart];
  __syncthreads();  // before the next ones are written
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
