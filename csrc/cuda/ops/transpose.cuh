// An 8 x 8 matrix of 16-bit numbers in the registers of a warp, transposed: lane l holds entries
// (l / 4, 2 * (l % 4)) and the one beside it, before and after.
#pragma once

#include <cuda_runtime.h>

#include "../../core/target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

__device__ inline uint32_t transpose_8x8(uint32_t pair) {
#ifdef __CUDACC__
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
#else
  return on_host::transpose_8x8(pair);
#endif
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
